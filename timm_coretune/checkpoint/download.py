"""A published file into a cache: resumed after a cut connection, checked for its size, complete or not there at all"""

import hashlib
import http.client
import json
import logging
import os
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Dict, Optional

import torch
from filelock import FileLock

from .sniff import sniff

_logger = logging.getLogger(__name__)

ATTEMPTS = 5  # connections in a row that bring nothing new, until the download is given up
TIMEOUT = 30  # seconds without a byte
LOOPBACK = ('127.0.0.1', 'localhost', '::1')
CHUNK = 2**20


def check_url(url: str) -> None:
    """Weights travel encrypted, except on this machine.

    Raises:
        ValueError: Another scheme, or plain http to another machine.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == 'https' or (parts.scheme == 'http' and parts.hostname in LOOPBACK):
        return
    raise ValueError(f'Expected an https:// URL, got {url!r}: others can be changed on the way.')


class _CheckedRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect must not lead to where the user could not have gone."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        check_url(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def cache_folder() -> str:
    """Beside the checkpoints of torch.hub and timm, so that TORCH_HOME moves all of them."""
    return os.path.join(torch.hub.get_dir(), 'checkpoints', 'timm_coretune')


def download(url: str) -> str:
    """Path of a URL's file in the cache, after downloading what is not there.

    Processes that ask for the same file wait for the one that downloads.

    Raises:
        ValueError: The URL is not allowed, there is no such file, or it does not arrive whole.
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
    part = path + '.part'
    _logger.info(f'Downloading {url} to {path}')
    failures = 0
    while True:
        before = os.path.getsize(part) if os.path.exists(part) else 0
        try:
            expected = _fetch(url, part)
        except (OSError, http.client.HTTPException) as e:  # of these, urllib.error.HTTPError is handled in _fetch
            expected, problem = None, str(e) or type(e).__name__
        size = os.path.getsize(part) if os.path.exists(part) else 0
        if expected is not None and size == expected:
            break
        if expected is not None:
            problem = f'{size} of {expected} bytes'
        failures = 0 if size > before else failures + 1
        if failures == ATTEMPTS or (expected is not None and size > expected):
            raise ValueError(f'Expected the whole file from {url!r}, got {problem}. Try again: it goes on from there.')
        _logger.info(f'Connection to {url} cut ({problem}), resuming')
    try:
        sniff(part)
    except ValueError:
        os.remove(part)
        raise
    finally:
        Path(part + '.json').unlink(missing_ok=True)
    os.replace(part, path)


def _fetch(url: str, part: str) -> Optional[int]:
    """Append what is missing to the part, and return how long the file is to be.

    The server is asked to go on only with the same version of the file, else it sends all of it.
    """
    have = os.path.getsize(part) if os.path.exists(part) else 0
    state = _read_state(part)
    headers = {'User-Agent': 'timm_coretune', 'Accept-Encoding': 'identity'}
    if have and state.get('validator'):
        headers.update({'Range': f'bytes={have}-', 'If-Range': state['validator']})
    opener = urllib.request.build_opener(_CheckedRedirects)
    try:
        response = opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as e:
        if e.code >= 500:
            raise OSError(f'HTTP {e.code} {e.reason}') from e
        if e.code == 416:  # nothing lies where the part ends: it is not a part of this file
            os.remove(part)
            raise OSError('HTTP 416, starting anew') from e
        hint = {404: 'Check the URL.', 401: 'It needs a login.', 403: 'It needs a login.'}.get(e.code, '')
        raise ValueError(f'Expected a file at {url!r}, got HTTP {e.code} {e.reason}. {hint}'.strip()) from e
    with response:
        resumed = response.status == 206
        length = response.headers.get('Content-Length')
        if length is None:
            raise ValueError(f'Expected {url!r} to tell the size of its file, it does not. Download it by hand.')
        total = int(length) + (have if resumed else 0)
        validator = response.headers.get('ETag') or response.headers.get('Last-Modified')
        if resumed and total != state.get('total'):
            raise ValueError(
                f'Expected {state.get("total")} bytes from {url!r}, its server now says {total}. '
                f'Remove {part!r} to start anew.'
            )
        Path(part + '.json').write_text(json.dumps({'validator': validator, 'total': total}))
        with open(part, 'ab' if resumed else 'wb') as f:
            while chunk := response.read(CHUNK):
                f.write(chunk)
    return total


def _read_state(part: str) -> Dict[str, object]:
    try:
        return json.loads(Path(part + '.json').read_text())
    except (OSError, ValueError):
        return {}
