"""Download a published file into a cache

A download continues after a lost connection. The file appears in the cache only once it is complete.
"""

import hashlib
import http.client
import json
import logging
import os
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import IO, Optional, TypedDict

import torch
from filelock import FileLock

from ..atomic import move_into_place
from .sniff import sniff

_logger = logging.getLogger(__name__)

ATTEMPTS = 5  # a download is given up after so many connections in a row that brought nothing new
TIMEOUT = 30  # a connection is given up after so many seconds without a byte
LOOPBACK = ('127.0.0.1', 'localhost', '::1')  # names of this machine
CHUNK = 2**20  # bytes that are read and written at once


class PartState(TypedDict, total=False):
    """What the server said about a file that is not complete yet. It is kept in a JSON file beside the part.

    Attributes:
        validator: Version of the file (its ETag or Last-Modified), None if the server names none.
        total: Length of the whole file in bytes.
    """

    validator: Optional[str]
    total: int


def check_url(url: str) -> None:
    """Accept https, and plain http on this machine only: weights could be changed on an unencrypted connection.

    Raises:
        ValueError: The URL has another scheme, or is plain http to another machine.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == 'https' or (parts.scheme == 'http' and parts.hostname in LOOPBACK):
        return
    raise ValueError(f'Expected an https:// URL, got {url!r}. Without encryption the file can be changed on the way.')


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
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def cache_folder() -> str:
    """Folder of all downloads, beside the checkpoints of torch.hub and timm. TORCH_HOME moves all of them."""
    return os.path.join(torch.hub.get_dir(), 'checkpoints', 'timm_coretune')


def download(url: str) -> str:
    """Download a file, unless it is in the cache already, and return its path there.

    If several processes ask for the same file, one downloads it and the others wait.

    Raises:
        ValueError: The URL is not allowed, there is no such file, or the file does not arrive completely.
    """
    check_url(url)
    name = os.path.basename(urllib.parse.urlsplit(url).path) or 'checkpoint'
    path = os.path.join(cache_folder(), f'{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}')
    os.makedirs(cache_folder(), exist_ok=True)
    with FileLock(path + '.lock'):
        if not os.path.exists(path):
            _download(url, path)
    return path


def _download(url: str, path: str) -> None:
    """Download into a part beside path, which a later run can continue, and move the complete file to path."""
    part = path + '.part'
    _logger.info(f'Downloading {url} to {path}')
    failures = 0
    while True:
        before = os.path.getsize(part) if os.path.exists(part) else 0
        try:
            expected = _fetch(url, part)
        except (OSError, http.client.HTTPException) as e:  # but not HTTPError, which _fetch handles
            expected, problem = None, str(e) or type(e).__name__
        size = os.path.getsize(part) if os.path.exists(part) else 0
        if expected is not None and size == expected:
            break
        if expected is not None:
            problem = f'{size} of {expected} bytes'
        failures = 0 if size > before else failures + 1
        if failures == ATTEMPTS or (expected is not None and size > expected):
            raise ValueError(
                f'Expected the whole file from {url!r}, got {problem}. Try again: the download continues there.'
            )
        _logger.info(f'Lost the connection to {url} ({problem}), continuing the download')
    try:
        sniff(part)
    except ValueError:
        os.remove(part)
        raise
    finally:
        Path(part + '.json').unlink(missing_ok=True)
    move_into_place(part, path)


def _fetch(url: str, part: str) -> int:
    """Append the missing bytes to the part, and return the length of the whole file.

    The server is asked to continue the file only if its version is the same. Otherwise it sends the whole file again.
    """
    have = os.path.getsize(part) if os.path.exists(part) else 0
    state = _read_state(part)
    headers = {'User-Agent': 'timm_coretune', 'Accept-Encoding': 'identity'}
    known_version = state.get('validator')
    if have and known_version:
        headers.update({'Range': f'bytes={have}-', 'If-Range': known_version})
    opener = urllib.request.build_opener(_CheckedRedirects)
    try:
        response = opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as e:
        if e.code >= 500:
            raise OSError(f'HTTP {e.code} {e.reason}') from e
        if e.code == 416:  # the server's file ends before the part does, so the part is not of this file
            os.remove(part)
            raise OSError('HTTP 416, starting again') from e
        login = 'The file needs a login: download it by hand.'
        hint = {404: 'Check the URL.', 401: login, 403: login}.get(e.code, '')
        raise ValueError(f'Expected a file at {url!r}, got HTTP {e.code} {e.reason}. {hint}'.strip()) from e
    with response:
        resumed = response.status == 206
        length = response.headers.get('Content-Length')
        if length is None:
            raise ValueError(
                f'Expected the server to tell the size of {url!r} (Content-Length), it does not. '
                'Download the file by hand and give its path.'
            )
        total = int(length) + (have if resumed else 0)
        validator = response.headers.get('ETag') or response.headers.get('Last-Modified')
        if resumed and total != state.get('total'):
            raise ValueError(
                f'Expected {state.get("total")} bytes from {url!r}, its server now says {total}. '
                f'Remove {part!r} to start again.'
            )
        Path(part + '.json').write_text(json.dumps({'validator': validator, 'total': total}))
        with open(part, 'ab' if resumed else 'wb') as f:
            while chunk := response.read(CHUNK):
                f.write(chunk)
    return total


def _read_state(part: str) -> PartState:
    """What is known of a part, empty if nothing is."""
    try:
        return json.loads(Path(part + '.json').read_text())
    except (OSError, ValueError):
        return {}
