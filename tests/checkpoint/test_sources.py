"""What a user may type: paths, folders, Hub ids, URLs, short names"""

import http.server
import json
import os
import re
import threading

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny_checkpoints import tiny, weights

import timm_coretune.checkpoint.download as download_module
from timm_coretune import load_checkpoint
from timm_coretune.checkpoint.download import check_url
from timm_coretune.checkpoint.rules import RULES
from timm_coretune.checkpoint.source import RELEASES


def moco(state_dict):
    return {'state_dict': {f'module.encoder_q.{k}': v for k, v in state_dict.items()}}


class Server:
    """Files over HTTP on this machine, with the faults that a test asks for."""

    def __init__(self):
        self.files, self.requests = {}, []
        self.cut_after = []  # bytes after which the connection of each coming request is cut
        self.extra_length = 0  # how much longer than the file the server says it is
        self.etag = '"one"'
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'

            def log_message(self, *args):
                pass

            def do_GET(self):
                outer.requests.append(dict(self.headers))
                target = outer.files.get(self.path)
                if isinstance(target, str):
                    self.send_response(302)
                    self.send_header('Location', target)
                    self.send_header('Content-Length', '0')
                    self.end_headers()
                    return
                if target is None:
                    self.send_error(404)
                    return
                start = 0
                match = re.match(r'bytes=(\d+)-', self.headers.get('Range', ''))
                if match and self.headers.get('If-Range') == outer.etag:
                    start = int(match.group(1))
                self.send_response(206 if start else 200)
                body = target[start:]
                self.send_header('Content-Length', str(len(body) + outer.extra_length))
                self.send_header('ETag', outer.etag)
                if start:
                    total = len(target) + outer.extra_length
                    self.send_header('Content-Range', f'bytes {start}-{total - 1}/{total}')
                self.end_headers()
                if outer.cut_after:
                    body = body[: outer.cut_after.pop(0)]
                    self.close_connection = True
                elif outer.extra_length:
                    self.close_connection = True
                self.wfile.write(body)

        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server.server_address[1]}'
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr(download_module, 'WAITS', (0,))
    server = Server()
    torch.save(moco(weights()), tmp_path / 'file')
    server.files['/moco.pth.tar'] = (tmp_path / 'file').read_bytes()
    yield server
    server.server.shutdown()
    server.server.server_close()


def cached(tmp_path):
    return sorted(p.name for p in (tmp_path / 'cache').rglob('*') if p.is_file() and not p.name.endswith('.lock'))


def test_a_url_is_loaded_and_asked_for_once(server, tmp_path):
    model = tiny()
    for _ in range(2):
        assert load_checkpoint(model, f'{server.url}/moco.pth.tar').copy == 'query encoder'
    assert torch.equal(model.conv1[0].weight, weights()['conv1.0.weight'])
    assert len(server.requests) == 1
    assert len(cached(tmp_path)) == 1


def test_a_cut_connection_is_resumed_where_it_was_cut(server, tmp_path):
    server.cut_after = [50000, 1000]
    assert load_checkpoint(tiny(), f'{server.url}/moco.pth.tar').missing == ()
    assert [r.get('Range') for r in server.requests] == [None, 'bytes=50000-', 'bytes=51000-']
    assert len(cached(tmp_path)) == 1


def test_a_file_that_changed_meanwhile_is_taken_anew(server):
    server.cut_after = [50000]
    original = server.files['/moco.pth.tar']

    class ChangesAfterFirst(list):
        def pop(self, index=0):
            server.etag = '"two"'
            return super().pop(index)

    server.cut_after = ChangesAfterFirst(server.cut_after)
    assert load_checkpoint(tiny(), f'{server.url}/moco.pth.tar').missing == ()
    assert server.files['/moco.pth.tar'] is original
    assert [r.get('If-Range') for r in server.requests] == [None, '"one"']


def test_a_download_goes_on_in_the_next_run(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download_module, 'ATTEMPTS', 1)
    server.cut_after = [50000, 0]
    with pytest.raises(ValueError, match='Expected the whole file'):
        load_checkpoint(tiny(), f'{server.url}/moco.pth.tar')
    assert load_checkpoint(tiny(), f'{server.url}/moco.pth.tar').missing == ()
    assert server.requests[-1]['Range'] == 'bytes=50000-'


def test_a_file_shorter_than_announced_is_refused(server, tmp_path):
    server.extra_length = 10
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    size = len(server.files['/moco.pth.tar'])
    with pytest.raises(ValueError, match=f'Expected the whole file .*{size} of {size + 10} bytes|now says'):
        load_checkpoint(model, f'{server.url}/moco.pth.tar')
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(name.endswith('moco.pth.tar') for name in cached(tmp_path))


def test_a_missing_file_is_told(server):
    with pytest.raises(ValueError, match=r'HTTP 404 Not Found\. Check the URL'):
        load_checkpoint(tiny(), f'{server.url}/other.pth')


def test_a_page_instead_of_a_file_is_told_and_not_kept(server, tmp_path):
    server.files['/moco.pth'] = b'<html>Sign in</html>'
    for _ in range(2):
        with pytest.raises(ValueError, match='a web page'):
            load_checkpoint(tiny(), f'{server.url}/moco.pth')
    assert cached(tmp_path) == []


def test_no_server_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr(download_module, 'WAITS', (0,))
    with pytest.raises(ValueError, match='Expected the whole file'):
        load_checkpoint(tiny(), 'http://127.0.0.1:1/moco.pth')


def test_a_redirect_is_followed_only_to_where_the_user_could_go(server):
    server.files['/moved.pth'] = '/moco.pth.tar'
    assert load_checkpoint(tiny(), f'{server.url}/moved.pth').missing == ()
    server.files['/away.pth'] = 'http://example.com/moco.pth.tar'
    with pytest.raises(ValueError, match='Expected an https:// URL'):
        load_checkpoint(tiny(), f'{server.url}/away.pth')


@pytest.mark.parametrize(
    'url', ['http://example.com/a.pth', 'ftp://example.com/a.pth', 'file:///etc/passwd', 'http://127.0.0.1.evil.org/a']
)
def test_weights_from_elsewhere_travel_encrypted(url):
    with pytest.raises(ValueError, match='Expected an https:// URL'):
        load_checkpoint(tiny(), url)


def test_short_names_are_complete_and_secure():
    assert {'mocov2_resnet50', 'dino_vits16', 'swav_resnet50'} <= RELEASES.keys()
    for name, release in RELEASES.items():
        check_url(release.url)
        assert release.url.startswith('https://'), name
        assert re.fullmatch(r'\d{4}\.\d{5}', release.paper), name
        assert release.licence in ('CC-BY-NC-4.0', 'Apache-2.0', 'MIT'), name
        assert release.source, name
        assert timm.is_model(release.model.split(',')[0]), name
    assert len({release.url for release in RELEASES.values()}) == len(RELEASES)


def test_a_short_name_knows_how_its_images_were_normalized(server, monkeypatch):
    torch_file = f'{server.url}/moco.pth.tar'
    monkeypatch.setitem(RELEASES, 'dino_vits16', RELEASES['dino_vits16']._replace(url=torch_file))
    assert load_checkpoint(tiny(), 'dino_vits16').data_config['mean'] == (0.485, 0.456, 0.406)


def test_a_wrong_name_is_told_with_near_ones(tmp_path):
    with pytest.raises(ValueError, match='found none at .*mocov2_resnet50'):
        load_checkpoint(tiny(), 'mocov2_resnet_50')


@pytest.mark.parametrize('start', [b'\x80\x02', b'\x1f\x8b', b'<!', b'PK'], ids=repr)
def test_a_safetensors_file_may_begin_like_another_format(start, tmp_path):
    # it begins with the length of its header, which may be padded
    save_file(weights(), tmp_path / 'plain')
    content = (tmp_path / 'plain').read_bytes()
    length = int.from_bytes(content[:8], 'little')
    wanted = int.from_bytes(start, 'little')
    while wanted < length:
        wanted += 256 ** len(start)
    padded = wanted.to_bytes(8, 'little') + content[8 : 8 + length] + b' ' * (wanted - length) + content[8 + length :]
    (tmp_path / 'padded').write_bytes(padded)
    assert padded.startswith(start)
    assert load_checkpoint(tiny(), tmp_path / 'padded').missing == ()


def test_a_folder_with_one_file_of_any_name_is_enough(tmp_path):
    torch.save(moco(weights()), tmp_path / 'epoch_199.ckpt')
    (tmp_path / 'log.txt').write_text('loss 6.9')
    assert load_checkpoint(tiny(), tmp_path).missing == ()
    torch.save(moco(weights()), tmp_path / 'epoch_99.ckpt')
    with pytest.raises(ValueError, match=r'Expected one checkpoint .* found epoch_199.ckpt, epoch_99.ckpt'):
        load_checkpoint(tiny(), tmp_path)


def test_an_empty_folder_and_a_distributed_checkpoint_are_told(tmp_path):
    with pytest.raises(ValueError, match='found none'):
        load_checkpoint(tiny(), tmp_path)
    (tmp_path / '.metadata').touch()
    with pytest.raises(ValueError, match='dcp_to_torch'):
        load_checkpoint(tiny(), tmp_path)


def test_a_hub_id_is_resolved_with_its_revision(tmp_path, monkeypatch):
    save_file(weights(), tmp_path / 'model.safetensors')
    (tmp_path / 'preprocessor_config.json').write_text(
        json.dumps({'image_mean': [0.5, 0.5, 0.5], 'image_std': [0.5, 0.5, 0.5]})
    )
    asked = []

    def list_repo_files(repo_id, revision):
        asked.append((repo_id, revision))
        return ['README.md', 'model.safetensors', 'pytorch_model.bin', 'preprocessor_config.json']

    def snapshot_download(repo_id, revision, allow_patterns):
        asked.append((repo_id, revision))
        assert 'model.safetensors' in allow_patterns
        assert 'pytorch_model.bin' not in allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, 'list_repo_files', list_repo_files)
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot_download)
    report = load_checkpoint(tiny(), 'hf-hub:owner/name@v2')
    assert asked == [('owner/name', 'v2')] * 2
    assert report.data_config['mean'] == (0.5, 0.5, 0.5)


def test_a_wrong_hub_id_is_told():
    with pytest.raises(ValueError, match='Expected a repository of the Hub'):
        load_checkpoint(tiny(), 'hf-hub:not a name')


def test_an_npz_archive_is_read_by_timm_and_checked(tmp_path):
    import numpy as np

    model = timm.create_model('test_vit', num_classes=0)
    np.savez(tmp_path / 'vit.npz', a=np.zeros(3))
    with pytest.raises(ValueError, match='Expected a JAX archive'):
        load_checkpoint(model, tmp_path / 'vit.npz')
    with pytest.raises(ValueError, match='Take the PyTorch or safetensors file'):
        load_checkpoint(tiny(), tmp_path / 'vit.npz')


def test_rules_and_short_names_state_their_sources():
    assert all(rule.source and rule.why and rule.copy for rule in RULES)
    assert os.path.basename(RELEASES['mocov2_resnet50'].url) == 'moco_v2_800ep_pretrain.pth.tar'
