"""A Hub on loopback: what the client of huggingface_hub asks for when it pushes and loads, and faults on demand"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import huggingface_hub

TOKEN = 'hf_the_token_of_the_tests'
SIGNATURE = 'X-Amz-Signature=0123456789abcdef0123456789abcdef'  # in the URL that weights are uploaded to


def connect_client(server, monkeypatch):
    """Let the client of this process speak to the server, with a token."""
    constants = huggingface_hub.constants
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
    # where releases before 1.0 keep a copy
    monkeypatch.setattr(huggingface_hub.file_download, 'HUGGINGFACE_CO_URL_TEMPLATE', template, raising=False)
    monkeypatch.setattr(constants, 'ENDPOINT', server.url)
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True, raising=False)
    monkeypatch.setenv('HF_TOKEN', TOKEN)


class Repository:
    """Branches of commits, each a title and files by name."""

    def __init__(self, private=False):
        self.private = private
        self.branches = {'main': [(hashlib.sha1(b'initial').hexdigest(), 'initial commit', {})]}

    def find(self, revision):
        """Commits up to a branch or a commit, None if there is no such."""
        if revision in self.branches:
            return self.branches[revision]
        for commits in self.branches.values():
            for index, (oid, _, _) in enumerate(commits):
                if oid == revision:
                    return commits[: index + 1]
        return None

    def files(self, revision='main'):
        return self.find(revision)[-1][2]

    def add_once(self, commit):
        """Put a commit of someone else on the main branch, unless it is there."""
        if commit not in self.branches['main']:
            self.branches['main'].append(commit)


class HubServer(ThreadingHTTPServer):
    """The server.

    Attributes:
        repositories: Repositories by owner/name.
        requests: Method and path of every request.
        received: Body of every request.
        faults: By name of a step, what its next requests meet: a status, 'cut' before it is done, 'lost' after it is
            done but before the answer, 'hang' until the server ends, 'login' for a redirect to a page, or the content
            of an answer.
        hanging: Set once a request hangs.
        files: Files by path, for requests with a login, and the logins so far.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server_port}'
        self.repositories, self.objects, self.requests, self.received = {}, {}, [], []
        self.files, self.logins = {}, []
        self.busy, self.faults, self.hanging, self.ended = None, {}, threading.Event(), threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def fail(self, step, *faults):
        self.faults[step] = deque(faults)

    def end(self):
        self.ended.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        pass  # clients that were cut off, or cut off themselves


STEPS = (
    ('create', 'POST', r'/api/repos/create'),
    ('validate', 'POST', r'/api/validate-yaml'),
    ('branch', 'POST', r'/api/models/([^/]+/[^/]+)/branch/(.+)'),
    ('preupload', 'POST', r'/api/models/([^/]+/[^/]+)/preupload/(.+)'),
    ('commit', 'POST', r'/api/models/([^/]+/[^/]+)/commit/(.+)'),
    ('paths', 'POST', r'/api/models/([^/]+/[^/]+)/paths-info/(.+)'),
    ('info', 'GET', r'/api/models/([^/]+/[^/]+)(?:/revision/(.+))?'),
    ('tree', 'GET', r'/api/models/([^/]+/[^/]+)/tree/(.+)'),
    ('batch', 'POST', r'/([^/]+/[^/]+)\.git/info/lfs/objects/batch'),
    ('upload', 'PUT', r'/lfs/(\w+)'),
    ('resolve', 'HEAD', r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)'),
    ('resolve', 'GET', r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)'),
)


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args):
        pass

    def answer(self, status, content=b'', **headers):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        if self.fault == 'lost':
            return self.cut()
        self.send_response(status)
        headers['Content_Length'] = len(content)
        for name, value in headers.items():
            self.send_header(name.replace('_', '-'), str(value))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(content)
        return None

    def refusal(self):
        # errors of the server itself often come as the page of a proxy
        return f'<html>{self.fault}</html>'.encode() if self.fault >= 500 else {'error': 'refused on purpose'}

    def cut(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def handle_step(self):
        path = unquote(self.path.partition('?')[0])
        self.fault = None
        if path == '/login':
            return self.answer(200, b'<html>Log in</html>')
        if path in self.server.files:
            self.server.logins.append(self.headers.get('Authorization'))
            return self.answer(200 if self.server.logins[-1] else 401, self.server.files[path])
        self.body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        self.server.requests.append((self.command, path))
        self.server.received.append(self.body)
        matches = [(name, re.fullmatch(pattern, path)) for name, method, pattern in STEPS if method == self.command]
        matches = [(name, match) for name, match in matches if match]
        if not matches:
            return self.answer(501, {'error': f'{self.command} {path} is not served'})
        name, match = matches[0]
        faults = self.server.faults.get(name)
        self.fault = faults.popleft() if faults else None
        if self.fault == 'cut':
            return self.cut()
        if self.fault == 'hang':
            self.server.hanging.set()
            return self.server.ended.wait()
        if self.fault == 'login':
            return self.answer(302, Location=f'{self.server.url}/login')
        if isinstance(self.fault, (dict, list, bytes)):
            return self.answer(200, self.fault)
        if isinstance(self.fault, int):
            return self.answer(self.fault, self.refusal(), X_Error_Message='refused on purpose')
        if name not in ('resolve', 'upload') and self.headers.get('Authorization') != f'Bearer {TOKEN}':
            return self.answer(
                401, {'error': 'Invalid credentials'}, X_Error_Message='Invalid credentials in Authorization header'
            )
        return getattr(self, f'on_{name}')(*match.groups())

    do_GET = do_HEAD = do_POST = do_PUT = handle_step

    def repository(self, name):
        return self.server.repositories[name]

    def on_create(self):
        if self.server.busy:
            return self.answer(409, self.server.busy)
        asked = json.loads(self.body)
        name = f'{asked["organization"] or "me"}/{asked["name"]}'
        if not name.startswith('me/'):
            return self.answer(403, {'error': 'forbidden'})
        status = 409 if name in self.server.repositories else 200
        if status == 200:
            self.server.repositories[name] = Repository(
                asked.get('visibility') == 'private' or asked.get('private', False)
            )
        return self.answer(status, {'url': f'{self.server.url}/{name}', 'error': 'You already created this repo'})

    def on_validate(self):
        assert json.loads(self.body)['content'].startswith('---\n')
        return self.answer(200, {'errors': [], 'warnings': []})

    def on_branch(self, name, branch):
        branches = self.repository(name).branches
        status = 409 if branch in branches else 200
        branches.setdefault(branch, list(branches['main']))
        return self.answer(status, {})

    def on_preupload(self, name, revision):
        files = [
            {
                'path': file['path'],
                'uploadMode': 'lfs' if file['path'].endswith('.safetensors') else 'regular',
                'shouldIgnore': False,
            }
            for file in json.loads(self.body)['files']
        ]
        return self.answer(200, {'files': files})

    def on_batch(self, name):
        objects = json.loads(self.body)['objects']
        for item in objects:
            if item['oid'] not in self.server.objects:
                item['actions'] = {'upload': {'href': f'{self.server.url}/lfs/{item["oid"]}?{SIGNATURE}'}}
        return self.answer(200, {'transfer': 'basic', 'objects': objects})

    def on_upload(self, oid):
        assert hashlib.sha256(self.body).hexdigest() == oid
        assert self.headers.get('Authorization') is None
        self.server.objects[oid] = self.body
        return self.answer(200)

    def on_commit(self, name, revision):
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]['value']
        commits = self.repository(name).branches[revision]
        if header.get('parentCommit') not in (None, commits[-1][0]):
            return self.answer(412, {'error': 'A commit has happened since. Please refresh and try again.'})
        files = dict(commits[-1][2])
        for line in lines[1:]:
            value = line['value']
            if line['key'] == 'lfsFile':
                files[value['path']] = self.server.objects[value['oid']]
            else:
                files[value['path']] = base64.b64decode(value['content'])
        oid = hashlib.sha1(f'{commits[-1][0]} {self.body}'.encode()).hexdigest()
        commits.append((oid, header['summary'], files))
        return self.answer(200, {'commitUrl': f'{self.server.url}/{name}/commit/{oid}', 'commitOid': oid})

    def on_paths(self, name, revision):
        files = self.repository(name).files(revision)
        paths = re.findall(r'paths=([^&]+)', self.body.decode()) or json.loads(self.body)['paths']
        found = [
            {
                'type': 'file', 'path': path, 'oid': '0' * 40, 'size': len(files[path]),
                'lfs': {'oid': hashlib.sha256(files[path]).hexdigest(), 'size': len(files[path]), 'pointerSize': 130},
            }
            for path in map(unquote, paths) if path in files
        ]  # fmt: skip
        return self.answer(200, found)

    def on_info(self, name, revision):
        repository = self.server.repositories.get(name)
        commits = repository and repository.find(revision or 'main')
        if not commits:
            return self.answer(404, {'error': 'not found'}, X_Error_Code='RepoNotFound')
        siblings = [{'rfilename': path} for path in commits[-1][2]]
        return self.answer(
            200, {'id': name, 'sha': commits[-1][0], 'private': repository.private, 'siblings': siblings}
        )

    def on_tree(self, name, revision):
        repository = self.server.repositories.get(name)
        commits = repository and repository.find(revision)
        if not commits:
            return self.answer(404, {'error': 'not found'}, X_Error_Code='RepoNotFound')
        files = commits[-1][2].items()
        return self.answer(
            200, [{'type': 'file', 'path': path, 'size': len(content), 'oid': '0' * 40} for path, content in files]
        )

    def on_resolve(self, name, revision, path):
        repository = self.server.repositories.get(name)
        commits = repository and repository.find(revision)
        if not commits:
            return self.answer(404, X_Error_Code='RepoNotFound')
        if path not in commits[-1][2]:
            return self.answer(404, X_Error_Code='EntryNotFound')
        content = commits[-1][2][path]
        headers = {'ETag': f'"{hashlib.sha256(content).hexdigest()}"', 'X_Repo_Commit': commits[-1][0]}
        wanted = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))
        if not wanted:
            return self.answer(200, content, **headers)
        start, end = int(wanted[1]), int(wanted[2] or len(content) - 1)
        headers['Content_Range'] = f'bytes {start}-{end}/{len(content)}'
        return self.answer(206, content[start : end + 1], **headers)
