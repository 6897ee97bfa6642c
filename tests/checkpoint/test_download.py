"""Downloads from servers that do not do what they are asked, by URLs with secrets, and for no longer than allowed"""

import base64
import http.server
import logging
import re
import threading
import time
from collections import deque

import pytest
from safetensors.torch import save
from tiny_checkpoints import weights

import timm_coretune.checkpoint.download as download_module
from timm_coretune.checkpoint.download import download
from timm_coretune.redaction import split_url

CONTENT = save(weights())
HAVE = 50_000  # bytes before the first connection is cut
TOTAL = len(CONTENT)
REST = TOTAL - HAVE


def whole(handler):
    handler.send(200, CONTENT)


def cut(handler):
    handler.send(200, CONTENT[:HAVE], Content_Length=TOTAL)


def rest(handler):
    start = int(re.match(r'bytes=(\d+)-', handler.headers['Range'])[1])
    handler.send(206, CONTENT[start:], Content_Range=f'bytes {start}-{TOTAL - 1}/{TOTAL}')


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.requests.append((self.path, dict(self.headers)))
        answers = self.server.answers
        (answers.popleft() if len(answers) > 1 else answers[0])(self)

    def send(self, status, body=b'', **headers):
        self.send_response(status)
        for name, value in {'ETag': '"one"', 'Content_Length': len(body), **headers}.items():
            if value is not None:
                self.send_header(name.replace('_', '-'), str(value))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server that answers in turn by its `answers`, again and again by the last one. Waits are only noted."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.handle_error = lambda *_: None  # clients that give up
    server.answers, server.requests, server.waits = deque([whole]), [], []
    server.place = f'127.0.0.1:{server.server_port}'
    server.url = f'http://{server.place}/m.safetensors'
    monkeypatch.setattr(time, 'sleep', server.waits.append)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def read(path):
    with open(path, 'rb') as f:
        return f.read()


# Each is an answer to a request for the bytes from HAVE on. As many come as are missing, so their number tells nothing.
WRONG = {
    'from-the-start': (CONTENT[:REST], f'bytes 0-{REST - 1}/{TOTAL}'),
    'shifted': (CONTENT[HAVE - 8 : TOTAL - 8], f'bytes {HAVE - 8}-{TOTAL - 9}/{TOTAL}'),
    'of-a-longer-file': (CONTENT[HAVE:], f'bytes {HAVE}-{TOTAL - 1}/{TOTAL + 8}'),
    'of-unknown-length': (CONTENT[HAVE:], f'bytes {HAVE}-{TOTAL - 1}/*'),
    'another-length': (CONTENT[:REST], f'bytes {HAVE}-{TOTAL - 2}/{TOTAL}'),
    'beyond-the-end': (CONTENT[:REST], f'bytes {HAVE}-{TOTAL}/{TOTAL}'),
    'no-range': (CONTENT[:REST], None),
    'other-units': (CONTENT[:REST], f'items {HAVE}-{TOTAL - 1}/{TOTAL}'),
    'no-numbers': (CONTENT[:REST], 'bytes one-two/three'),
}


@pytest.mark.parametrize('name', WRONG)
def test_other_bytes_than_those_asked_for_are_never_appended(server, name):
    body, content_range = WRONG[name]
    server.answers = deque([cut, lambda handler: handler.send(206, body, Content_Range=content_range), whole])
    assert read(download(server.url)) == CONTENT
    assert [headers.get('Range') for _, headers in server.requests] == [None, f'bytes={HAVE}-', None]


@pytest.mark.parametrize('headers', [{'ETag': '"two"'}, {'Content_Encoding': 'gzip'}], ids=['version', 'compressed'])
def test_the_rest_of_another_file_is_never_appended(server, headers):
    right = f'bytes {HAVE}-{TOTAL - 1}/{TOTAL}'
    answer = lambda handler: handler.send(206, CONTENT[:REST], Content_Range=right, **headers)  # noqa: E731
    server.answers = deque([cut, answer, whole])
    assert read(download(server.url)) == CONTENT
    assert len(server.requests) == 3


def test_a_server_that_always_sends_other_bytes_is_given_up_in_one_sentence(server):
    server.answers = deque([cut, lambda handler: handler.send(206, CONTENT[:REST], Content_Range='bytes 0-7/8')])
    with pytest.raises(ValueError, match=r'Expected the whole file .*got bytes 0-7/8 \(Content-Range\) in place of'):
        download(server.url)
    assert len(server.requests) < 10


def test_a_part_of_the_rest_is_continued(server):
    def piece(handler):
        handler.send(206, CONTENT[HAVE : HAVE + 9], Content_Range=f'bytes {HAVE}-{HAVE + 8}/{TOTAL}')

    server.answers = deque([cut, piece, rest])
    assert read(download(server.url)) == CONTENT
    assert server.requests[-1][1]['Range'] == f'bytes={HAVE + 9}-'


def test_a_version_that_is_not_exact_is_not_continued(server):
    weak = {'ETag': 'W/"one"', 'Content_Length': TOTAL}
    server.answers = deque([lambda handler: handler.send(200, CONTENT[:HAVE], **weak), whole])
    assert read(download(server.url)) == CONTENT
    assert 'Range' not in server.requests[1][1]


def test_attempts_wait_longer_and_longer_and_as_long_as_the_server_asks(server):
    busy = lambda handler: handler.send(503)  # noqa: E731
    server.answers = deque([busy, busy, lambda handler: handler.send(429, Retry_After=20), busy, whole])
    assert read(download(server.url)) == CONTENT
    assert server.waits == [1, 2, 20, 8]
    server.answers, server.waits[:] = deque([lambda handler: handler.send(503, Retry_After=9999)]), []
    with pytest.raises(ValueError, match='HTTP 503'):
        download(f'{server.url}?again')
    assert server.waits == [60] * 4


def test_a_download_that_trickles_ends_in_time_and_is_continued_later(server, monkeypatch):
    stopped = threading.Event()

    def trickle(handler):
        handler.send(200, CONTENT[:HAVE], Content_Length=TOTAL)
        for place in range(HAVE, TOTAL):
            if stopped.wait(0.01):
                return
            handler.wfile.write(CONTENT[place : place + 1])
            handler.wfile.flush()

    server.answers = deque([trickle, rest])
    monkeypatch.setattr(download_module, 'PATIENCE', 0.2)
    monkeypatch.setattr(download_module, 'SLOWEST', 10 * HAVE)
    began = time.monotonic()
    with pytest.raises(ValueError, match=r'got \d+ of \d+ bytes in \d+ seconds. Try again: the download continues'):
        download(server.url)
    assert time.monotonic() - began < 5
    stopped.set()
    monkeypatch.setattr(download_module, 'PATIENCE', 600)
    assert read(download(server.url)) == CONTENT


SECRETS = ('letmein1', 'SiGnAtUrE', 'hf_abcdefgh12345678')


def secret_url(server, signature=SECRETS[1]):
    login = f'user:{SECRETS[0]}@'
    return f'http://{login}{server.place}/m.safetensors?X-Amz-Signature={signature}&token={SECRETS[2]}&download=1'


def test_a_login_goes_to_the_server_of_the_url_and_nowhere_else(server, caplog):
    caplog.set_level(logging.INFO)
    away = f'http://localhost:{server.server_port}/moved?sig={SECRETS[1]}'
    server.answers = deque([lambda handler: handler.send(302, Location=away), whole])
    assert read(download(secret_url(server))) == CONTENT
    (path, first), (_, second) = server.requests
    assert base64.b64decode(first['Authorization'].split()[1]).decode() == f'user:{SECRETS[0]}'
    assert path.endswith(f'?X-Amz-Signature={SECRETS[1]}&token={SECRETS[2]}&download=1')
    assert 'Authorization' not in second
    assert f'Downloading {split_url(secret_url(server))[0]} to ' in caplog.text
    assert not any(secret in caplog.text for secret in SECRETS)


FAULTS = {
    'refused': [lambda handler: handler.send(403)],
    'missing': [lambda handler: handler.send(404)],
    'cut': [lambda handler: handler.send(200, Content_Length=TOTAL)],
    'away': [lambda handler: handler.send(302, Location=f'http://example.com/{SECRETS[0]}?sig={SECRETS[1]}')],
    'odd-redirect': [lambda handler: handler.send(302, Location=f'http://user:{SECRETS[0]} {SECRETS[1]}@127.0.0.1/')],
    'page': [lambda handler: handler.send(200, b'<html>')],
    'no-length': [lambda handler: handler.send(200, Content_Length=None)],
}


@pytest.mark.parametrize('fault', FAULTS)
def test_no_error_tells_a_secret(server, caplog, fault):
    caplog.set_level(logging.INFO)
    server.answers = deque(FAULTS[fault])
    with pytest.raises(ValueError, match=r'Expected') as failed:
        download(secret_url(server))
    error = failed.value
    told = [caplog.text]
    while error is not None:
        told.append(f'{error} {error!r}')
        error = error.__cause__ or error.__context__
    assert not any(secret in text for secret in SECRETS for text in told), told


def test_a_url_without_its_secrets_finds_what_was_downloaded(server):
    path = download(secret_url(server))
    written = split_url(secret_url(server))[0]
    assert not any(secret in written + path for secret in SECRETS)
    assert download(written) == path
    download(secret_url(server, signature='another'))  # of the next day, for the same file
    assert read(download(written)) == CONTENT
    server.answers = deque([lambda handler: handler.send(200, CONTENT[:-8])])
    download(secret_url(server, signature='of-another-file'))
    with pytest.raises(ValueError, match='3 files that differ were downloaded from it. Give the whole URL again'):
        download(written)
    with pytest.raises(ValueError, match='secrets were left out .* but it was not downloaded here'):
        download(written.replace('m.safetensors', 'other.safetensors'))
