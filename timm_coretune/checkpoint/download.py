"""Download a published file into a cache

A download continues after a lost connection. The file appears in the cache only once it is complete.
"""

import base64
import errno
import filecmp
import glob
import hashlib
import http.client
import json
import logging
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import IO, Dict, Optional, Tuple, TypedDict, cast

import torch
from filelock import FileLock

from ..atomic import move_into_place
from ..redaction import REDACTED, redact, remember, split_url
from .sniff import sniff

_logger = logging.getLogger(__name__)

ATTEMPTS = 5  # a download is given up after so many connections in a row that brought nothing new
WAITS = (1, 2, 4, 8)  # seconds before each further connection after one that brought nothing new
LONGEST_WAIT = 60  # seconds, if the server asks for more time
TIMEOUT = 30  # a connection is given up after so many seconds without a byte
PATIENCE = 600  # seconds that a download may take, and SLOWEST bytes more for each further second
SLOWEST = 50_000
LOOPBACK = ('127.0.0.1', 'localhost', '::1')  # names of this machine
CHUNK = 2**20  # bytes that are read and written at once
# statuses of a server that may do better soon, besides those from 500 on
_PASSING = (408, 425, 429)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_RANGE = re.compile(r'bytes (\d+)-(\d+)/(\d+)')


class PartState(TypedDict, total=False):
    """What the server said about a file that is not complete yet. It is kept in a JSON file beside the part.

    Attributes:
        validator: Version of the file (its ETag or Last-Modified), None if the server names none.
        total: Length of the whole file in bytes.
    """

    validator: Optional[str]
    total: int


class _RetryError(OSError):
    """The server did not send what it was asked for, but may at the next attempt.

    Attributes:
        wait: Seconds that the server asks to wait.
        starts_anew: Whether the part is not of the file that the server has.
    """

    wait = 0
    starts_anew = False


def check_url(url: str) -> None:
    """Accept https, and plain http on this machine only: weights could be changed on an unencrypted connection.

    Raises:
        ValueError: The URL has another scheme, or is plain http to another machine.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == 'https' or (parts.scheme == 'http' and parts.hostname in LOOPBACK):
        return
    raise ValueError(
        f'Expected an https:// URL, got {redact(url)!r}. Without encryption the file can be changed on the way.'
    )


class _CheckedRedirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect only to a URL that `check_url` accepts."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> Optional[urllib.request.Request]:
        check_url(newurl)
        remember(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _request(url: str, headers: Dict[str, str]) -> urllib.request.Request:
    """A request of a URL, whose user and password go into a header that is not sent on to where it is redirected."""
    parts = urllib.parse.urlsplit(url)
    login, at, host = parts.netloc.rpartition('@')
    request = urllib.request.Request(parts._replace(netloc=host, fragment='').geturl(), headers=headers)
    if at:
        encoded = base64.b64encode(urllib.parse.unquote(login).encode()).decode()
        request.add_unredirected_header('Authorization', f'Basic {encoded}')
    return request


def cache_folder() -> str:
    """Folder of all downloads, beside the checkpoints of torch.hub and timm. TORCH_HOME moves all of them."""
    return os.path.join(torch.hub.get_dir(), 'checkpoints', 'timm_coretune')


def _digest(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()[:16]


def _cached_name(url: str) -> str:
    """Name of a file in the cache. The start of that of a URL with secrets tells the URL without them."""
    public = split_url(url)[0]
    name = os.path.basename(urllib.parse.urlsplit(public).path) or 'checkpoint'
    return f'{_digest(url)}-{name}' if public == url else f'{_digest(public)}-{_digest(url)}-{name}'


def _find_downloaded(url: str) -> str:
    """Path of the file that was downloaded from a URL whose secrets were left out when a run was written.

    Raises:
        ValueError: There is no such file, or there are several that differ.
    """
    start, _, name = _cached_name(url).partition('-')
    pattern = f'{glob.escape(os.path.join(cache_folder(), start))}-{"[0-9a-f]" * 16}-{glob.escape(name)}'
    paths = sorted(glob.glob(pattern))
    if not paths or not all(filecmp.cmp(paths[0], path, shallow=False) for path in paths[1:]):
        found = f'{len(paths)} files that differ were downloaded from it' if paths else 'it was not downloaded here'
        raise ValueError(
            f'Expected {url!r} in the cache of downloads, as its secrets were left out when the run was written, but '
            f'{found}. Give the whole URL again, or the path of the file.'
        )
    return paths[0]


def download(url: str) -> str:
    """Download a file, unless it is in the cache already, and return its path there.

    If several processes ask for the same file, one downloads it and the others wait.

    Args:
        url: The URL, which may have a login (`https://USER:PASSWORD@HOST/...`) or a signature. No message shows these.

    Raises:
        ValueError: The URL is not allowed, there is no such file, or the file does not arrive completely.
    """
    check_url(url)
    if REDACTED in url:
        return _find_downloaded(url)
    remember(url)
    path = os.path.join(cache_folder(), _cached_name(url))
    os.makedirs(cache_folder(), exist_ok=True)
    with FileLock(path + '.lock'):
        if not os.path.exists(path):
            _download(url, path)
    return path


def _download(url: str, path: str) -> None:
    """Download into a part beside path, which a later run can continue, and move the complete file to path."""
    part, shown = path + '.part', redact(url)
    _logger.info(f'Downloading {shown} to {redact(path)}')
    failures, began, had = 0, time.monotonic(), _size(part)
    most = had  # bytes that the part ever had; it may be started anew
    while True:
        expected, wait = None, 0
        try:
            expected = _fetch(url, part, began + PATIENCE)
            problem = f'{_size(part)} of {expected} bytes'
        except (OSError, http.client.HTTPException) as e:  # but not HTTPError, which _fetch handles
            if getattr(e, 'errno', None) in _DISK_FULL:
                raise ValueError(f'Expected to write the download to {redact(part)!r}: {e}. Make room.') from e
            problem, wait = redact(str(e)) or type(e).__name__, getattr(e, 'wait', 0)
        size = _size(part)
        if expected is not None and size == expected:
            break
        failures, most = (0, size) if size > most else (failures + 1, most)
        is_late = time.monotonic() > began + PATIENCE + max(size - had, 0) / SLOWEST
        if is_late:
            problem += f' in {time.monotonic() - began:.0f} seconds'
        if failures == ATTEMPTS or is_late or (expected is not None and size > expected):
            raise ValueError(
                f'Expected the whole file from {shown!r}, got {problem}. Try again: the download continues there.'
            ) from None
        _logger.info(f'Lost the connection to {shown} ({problem}), continuing the download')
        if failures:
            time.sleep(min(max(wait, WAITS[min(failures, len(WAITS)) - 1]), LONGEST_WAIT))
    try:
        sniff(part)
    except ValueError:
        os.remove(part)
        raise
    finally:
        Path(part + '.json').unlink(missing_ok=True)
    move_into_place(part, path)


def _size(path: str) -> int:
    return os.path.getsize(path) if os.path.exists(path) else 0


def _open(url: str, headers: Dict[str, str]) -> http.client.HTTPResponse:
    """Send a request and return its answer, if that is a file or a part of one."""
    shown = redact(url)
    opener = urllib.request.build_opener(_CheckedRedirects)
    try:
        return opener.open(_request(url, headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as e:
        if e.code >= 500 or e.code in (416, *_PASSING):
            error = _RetryError(f'HTTP {e.code} {e.reason}')
            asked = e.headers.get('Retry-After', '')
            error.wait = int(asked) if asked.isdigit() else 0
            error.starts_anew = e.code == 416  # the file ends before the part does, so the part is not of this file
            raise error from None
        login = 'The file needs a login: download it by hand.'
        if '@' in shown or '?' in shown:
            login = 'Check user and password, or whether the URL has expired.'
        hint = {404: 'Check the URL.', 401: login, 403: login}.get(e.code, '')
        raise ValueError(
            f'Expected a file at {shown!r}, got HTTP {e.code} {redact(str(e.reason))}. {hint}'.strip()
        ) from None


def _fetch(url: str, part: str, deadline: float) -> int:
    """Append the missing bytes to the part, and return the length of the whole file.

    The server is asked to continue the file only if its version is the same. Otherwise it sends the whole file again.
    What it sends is appended only if it says that these are the bytes that are missing.

    Args:
        url: The URL.
        part: File to append to.
        deadline: When to stop, later by a second for each SLOWEST bytes that come.
    """
    have, state = _size(part), _read_state(part)
    headers = {'User-Agent': 'timm_coretune', 'Accept-Encoding': 'identity'}
    version = state.get('validator')
    if have and version and not version.startswith('W/'):  # files of a weak version may differ in their bytes
        headers.update({'Range': f'bytes={have}-', 'If-Range': version})
    try:
        with _open(url, headers) as response:
            resumed = response.status == 206
            count, total = _promised(response, have if 'Range' in headers else 0, state, redact(url))
            if not resumed:
                new: PartState = {'validator': response.headers.get('ETag') or response.headers.get('Last-Modified')}
                Path(part + '.json').write_text(json.dumps({**new, 'total': total}))
            with open(part, 'ab' if resumed else 'wb') as f:
                left = count
                # read1 returns what has come, so that the time is looked at also while bytes trickle in
                while left and (chunk := response.read1(min(left, CHUNK))):
                    f.write(chunk)
                    left -= len(chunk)
                    if time.monotonic() > deadline + (count - left) / SLOWEST:
                        break
    except _RetryError as e:
        if e.starts_anew:
            Path(part).unlink(missing_ok=True)
        raise
    return total


def _promised(response: http.client.HTTPResponse, have: int, state: PartState, shown: str) -> Tuple[int, int]:
    """How many bytes an answer has, and how long the whole file is.

    Args:
        response: The answer.
        have: Bytes of the part that is to be continued, 0 if the whole file was asked for.
        state: What is known of the part.
        shown: The URL for messages.

    Raises:
        _RetryError: The answer has other bytes than those that were asked for.
        ValueError: The answer does not tell its length.
    """
    length = response.headers.get('Content-Length')
    is_plain = response.headers.get('Content-Encoding', 'identity') == 'identity'
    if response.status != 206:
        if length is None or not length.isdigit() or not is_plain:
            raise ValueError(
                f'Expected the server to tell the size of {shown!r} (Content-Length), it does not. '
                'Download the file by hand and give its path.'
            )
        return int(length), int(length)
    content_range = response.headers.get('Content-Range', '')
    match = _RANGE.fullmatch(content_range.strip())
    start, end, total = (int(number) for number in match.groups()) if match else (-1, -1, -1)
    is_right = have and have == start <= end < total == state.get('total')
    is_right = is_right and is_plain and length in (None, str(end - start + 1))
    if not is_right or response.headers.get('ETag', state.get('validator')) != state.get('validator'):
        error = _RetryError(
            f'{content_range or "some bytes"} (Content-Range) in place of bytes {have}-/{state.get("total")}; the '
            'download starts again'
        )
        error.starts_anew = True
        raise error
    return end - start + 1, total


def _read_state(part: str) -> PartState:
    """What is known of a part, empty if nothing is."""
    try:
        state = json.loads(Path(part + '.json').read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(state, dict) or not isinstance(state.get('validator', ''), str):
        return {}
    return cast(PartState, state)
