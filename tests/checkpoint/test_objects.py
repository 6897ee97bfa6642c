"""What lies beside the weights in a pickle runs nothing, and does not keep them from being read"""

import argparse
import collections
import datetime
import io
import logging
import pickle
import resource
import sys
import time
import types
import zipfile

import numpy as np
import pytest
import torch
from timm.models import load_state_dict
from tiny_checkpoints import tiny, weights

from timm_coretune import inspect_checkpoint, load_checkpoint
from timm_coretune.checkpoint.read import read_files
from timm_coretune.checkpoint.reading.torch_files import read_archive


class EasyDict(dict):
    """A dictionary with attributes, as several libraries have one."""

    def __init__(self, **values):
        super().__init__(values)
        self.__dict__.update(values)


class ModelCheckpoint:
    """A callback, whose class was the key of its state in old versions of Lightning."""

    def __init__(self):
        self.best = torch.zeros(3)


@pytest.fixture
def library():
    """A library that is there when a file is written and gone when it is read."""
    module = types.ModuleType('absent_library')
    for kind in (EasyDict, ModelCheckpoint):
        setattr(module, kind.__name__, kind)
        kind.__module__ = module.__name__
    sys.modules[module.__name__] = module
    yield module
    for kind in (EasyDict, ModelCheckpoint):
        kind.__module__ = __name__
    sys.modules.pop(module.__name__, None)


def loads_all(path, expected=None, **options):
    model = tiny()
    report = load_checkpoint(model, path, **options)
    state = model.state_dict()
    for name, tensor in (weights() if expected is None else expected).items():
        assert torch.equal(state[name], tensor), name
    return report


OBJECTS = {
    'collections.defaultdict': lambda: collections.defaultdict(list),
    'collections.deque': lambda: collections.deque([1, 2]),
    'datetime.datetime': lambda: datetime.datetime(2024, 2, 29),
    'types.SimpleNamespace': lambda: types.SimpleNamespace(lr=0.1),
    'absent_library.EasyDict': lambda: EasyDict(),
    'absent_library.ModelCheckpoint': lambda: ModelCheckpoint(),
    'argparse.Namespace': lambda: argparse.Namespace(lr=0.1),
    'torch.nn.modules.linear.Linear': lambda: torch.nn.Linear(2, 2),
    'torch._utils._rebuild_sparse_tensor': lambda: torch.eye(3).to_sparse(),
}


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'older format'])
@pytest.mark.parametrize('name', OBJECTS)
def test_an_object_beside_the_weights_is_left_out_and_counted(name, zipped, library, tmp_path, caplog):
    content = {'state_dict': weights(), 'extra': [OBJECTS[name](), OBJECTS[name]()]}
    torch.save(content, tmp_path / 'checkpoint.pth', _use_new_zipfile_serialization=zipped)
    del sys.modules['absent_library']
    with caplog.at_level(logging.INFO, 'timm_coretune'):
        report = loads_all(tmp_path / 'checkpoint.pth')
    assert report.left_out[name] == 2
    assert f'{name} (2)' in str(report)
    assert f'{name} (2)' in caplog.text
    assert 'absent_library' not in sys.modules


def test_a_class_may_be_the_key_of_a_dictionary(library, tmp_path):
    torch.save({'callbacks': {ModelCheckpoint: {'best': 1}}, 'state_dict': weights()}, tmp_path / 'a.ckpt')
    del sys.modules['absent_library']
    assert loads_all(tmp_path / 'a.ckpt').left_out == {'absent_library.ModelCheckpoint': 1}


@pytest.mark.parametrize('wrap', [
    lambda state: EasyDict(model=EasyDict(**state)),
    lambda state: collections.defaultdict(dict, model=collections.OrderedDict(state)),
    lambda state: {'model': collections.defaultdict(list, state)},
], ids=['EasyDict', 'defaultdict', 'state in a defaultdict'])  # fmt: skip
def test_weights_inside_of_another_kind_of_dictionary_are_read(wrap, library, tmp_path):
    torch.save(wrap(weights()), tmp_path / 'a.pth')
    assert loads_all(tmp_path / 'a.pth').left_out == {}


@pytest.mark.parametrize('protocol', range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize('change', ['C', 'F', '>f4', 'transposed'])
def test_arrays_by_name_are_read(change, protocol, tmp_path):
    def array(tensor):
        if change == 'transposed':
            return tensor.numpy().T.copy().T
        is_number = change == '>f4' and tensor.is_floating_point()
        return np.array(tensor.numpy(), dtype='>f4' if is_number else None, order='F' if change == 'F' else 'C')

    arrays = {name: array(tensor) for name, tensor in weights().items()}
    (tmp_path / 'plain.pkl').write_bytes(pickle.dumps({'model': arrays, 'author': 'x'}, protocol))
    loads_all(tmp_path / 'plain.pkl')
    if protocol == 2:
        torch.save({'model': arrays}, tmp_path / 'saved.pth')
        loads_all(tmp_path / 'saved.pth')


@pytest.mark.parametrize('protocol', range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_plain_pickle_of_tensors_is_read(protocol, tmp_path):
    (tmp_path / 'a.pkl').write_bytes(pickle.dumps({'state_dict': weights()}, protocol))
    loads_all(tmp_path / 'a.pkl')


def zipped_again(source, target, method=zipfile.ZIP_DEFLATED, change=lambda name, content: content):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, 'w', method) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))


@pytest.mark.parametrize('method', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_archive_that_was_packed_again_is_read(method, tmp_path):

    torch.save(weights(), tmp_path / 'a.pth')
    zipped_again(tmp_path / 'a.pth', tmp_path / 'again.pth', method)
    loads_all(tmp_path / 'again.pth', load_state_dict(str(tmp_path / 'again.pth')))


def various():
    """Tensors of many kinds, some of which share a storage."""
    base = torch.arange(60, dtype=torch.float32)
    return {
        'base': base, 'view': base[7:31].view(4, 6), 'transposed': base.view(6, 10).t(), 'steps': base[::7],
        'scalar': torch.tensor(3.5), 'empty': torch.zeros(0, 3), 'expanded': torch.ones(1, 4).expand(3, 4),
        'half': base.half(), 'bfloat16': base.bfloat16(), 'float8': base.to(torch.float8_e4m3fn), 'bool': base > 3,
        'uint8': base.byte(), 'uint16': base.to(torch.uint16), 'complex': torch.complex(base, base),
        'int64': base.long(),
        'parameter': torch.nn.Parameter(base.clone()), 'buffer': torch.nn.Buffer(base.clone()),
    }  # fmt: skip


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'older format'])
def test_tensors_are_those_that_torch_reads(zipped, tmp_path):
    path = str(tmp_path / 'a.pth')
    # the older format has no types that came later, and torch does not read what it writes of them
    tensors = {name: t for name, t in various().items() if zipped or name not in ('uint16', 'float8')}
    torch.save({'a': tensors}, path, _use_new_zipfile_serialization=zipped)
    expected = torch.load(path, weights_only=True)['a']
    read = read_files(path, (path,), {}).tree['a']
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert type(read[name]) is torch.Tensor, name
        assert (read[name].shape, read[name].dtype) == (tensor.shape, tensor.dtype), name
        assert read[name].tolist() == tensor.tolist(), name


def test_a_file_of_a_machine_that_writes_the_largest_byte_first_is_read(tmp_path):
    path, swapped = tmp_path / 'a.pth', tmp_path / 'swapped.pth'
    torch.save(weights(), path)
    types_of_storages = {}  # key of a storage: type of its elements

    class Noting(pickle.Unpickler):
        def persistent_load(self, id_):
            types_of_storages[id_[2]] = id_[1].dtype
            return torch.storage.TypedStorage(wrap_storage=torch.UntypedStorage(id_[4] * id_[1].dtype.itemsize),
                                              dtype=id_[1].dtype, _internal=True)  # fmt: skip

    with zipfile.ZipFile(path) as archive:
        Noting(io.BytesIO(archive.read(next(n for n in archive.namelist() if n.endswith('data.pkl'))))).load()

    def swap(name, content):
        if name.endswith('byteorder'):
            return b'big'
        key = name.rpartition('/')[2]
        if '/data/' not in name or not content:
            return content
        size = types_of_storages[key].itemsize
        return np.frombuffer(content, f'V{size}').view(f'u{size}').byteswap().tobytes()

    zipped_again(path, swapped, zipfile.ZIP_STORED, swap)
    loads_all(swapped, torch.load(swapped, weights_only=True))


def test_a_module_that_a_file_names_is_not_imported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / 'trap.py').write_text('open("marker", "w").close()\ndef call(*args): open("marker", "w").close()\n')
    torch.save({'state_dict': weights(), 'x': 0}, 'a.pth')
    program = b'ctrap\ncall\nK\x01\x85RK\x02b'  # call it, then give the result a state
    zipped_again('a.pth', 'trap.pth', zipfile.ZIP_STORED,
                 lambda name, c: c.replace(b'X\x01\x00\x00\x00x', b'X\x01\x00\x00\x00x' + program + b'0')
                 if name.endswith('.pkl') else c)  # fmt: skip
    assert loads_all('trap.pth').left_out == {'trap.call': 1}
    assert 'trap' not in sys.modules
    assert not (tmp_path / 'marker').exists()
    with pytest.raises(pickle.UnpicklingError):
        torch.load('trap.pth', weights_only=True)


@pytest.mark.parametrize(
    'name', ['os\nsystem', 'subprocess\nPopen', '__builtin__\neval', 'builtins\nexec', 'nt\nsystem']
)
def test_a_file_that_names_a_command_is_refused(name, tmp_path):
    (tmp_path / 'a.pkl').write_bytes(b'\x80\x02}X\x01\x00\x00\x00ac' + name.encode() + b'\n)Rs.')
    with pytest.raises(
        ValueError, match=f'wants to import \\w+.{name[-4:]}, which runs commands.*a.pkl|a.pkl.*commands'
    ):
        load_checkpoint(tiny(), tmp_path / 'a.pkl')


def test_the_refusal_of_a_whole_module_does_not_advise_to_run_it(tmp_path):
    torch.save(tiny(), tmp_path / 'a.pth')
    with pytest.raises(ValueError, match='one object of timm.models.resnet.ResNet.*state_dict') as error:
        inspect_checkpoint(tmp_path / 'a.pth')
    assert 'weights_only' not in str(error.value)


TENSOR = (
    b'ctorch._utils\n_rebuild_tensor_v2\n('
    + b'(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ'
)
HUGE = b'\x8a\x06' + (2**40).to_bytes(6, 'little')
PROGRAMS = {
    'a long bytearray': b'cbuiltins\nbytearray\n' + HUGE + b'\x85R',
    'bytes that are not there': b'\x8e' + HUGE[2:] + b'\0\0',
    'a place far up in the memo': b'Nr\xff\xff\xff\xff',
    'tuples in tuples': b')' + b'\x85' * 100_000,
    'a list that is copied': b'](' + b'N' * 9_000 + b'eq\x00'
    + b'ccollections\nOrderedDict\nh\x00\x85R0' * 9_000 + b'N',
    'a text that is copied': b'X\x00\x00\x01\x00' + b'a' * 65_536 + b'q\x00'
    + b'c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R0' * 3_000 + b'N',
    'a tensor of too many elements': TENSOR + b'K\x00' + HUGE + b'\x85K\x01\x85\x89}tR',
    'a tensor far behind its storage': TENSOR + HUGE + b'K\x01\x85K\x01\x85\x89}tR',
    'a tensor with negative steps': TENSOR + b'K\x00K\x02\x85J\xff\xff\xff\xff\x85\x89}tR',
    'a function of torch': b'ctorch\nempty\n' + HUGE + b'\x85R',
    'a function that downloads': b'ctorch.hub\nload_state_dict_from_url\nX\x08\x00\x00\x00http://a\x85R',
    'lists and no end': b']' * 100_000,
}  # fmt: skip


@pytest.mark.parametrize('name', PROGRAMS)
def test_a_pickle_that_asks_for_memory_gets_none(name, tmp_path):
    torch.save({'a': torch.zeros(4)}, tmp_path / 'a.pth')
    program = b'\x80\x04}X\x01\x00\x00\x00b' + PROGRAMS[name] + b's.'
    zipped_again(tmp_path / 'a.pth', tmp_path / 'b.pth', zipfile.ZIP_STORED,
                 lambda n, c: program if n.endswith('.pkl') else c)  # fmt: skip
    start, resident = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match='b.pth'):
        load_checkpoint(tiny(), tmp_path / 'b.pth')
    assert time.perf_counter() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < 200 * 2**10


def test_the_placeholder_of_a_class_cannot_change_a_class(tmp_path):
    program = b'\x80\x02cargparse\nNamespace\nN}X\x08\x00\x00\x00__init__Ns\x86b.'
    (tmp_path / 'a.pkl').write_bytes(program)
    init = argparse.Namespace.__init__
    with pytest.raises(ValueError, match=r'a\.pkl'):
        load_checkpoint(tiny(), tmp_path / 'a.pkl')
    assert argparse.Namespace.__init__ is init


def test_attributes_of_tensors_are_not_read(tmp_path):
    state = weights()
    for number, tensor in enumerate(state.values()):
        tensor.parts = [torch.zeros(3)] if number % 2 else (torch.zeros(1).expand(2**40),)
    torch.save(state, tmp_path / 'a.pth')
    assert hasattr(torch.load(tmp_path / 'a.pth', weights_only=True)['conv1.0.weight'], 'parts')
    read = read_archive(str(tmp_path / 'a.pth')).content
    assert all(type(tensor) is torch.Tensor and not tensor.__dict__ for tensor in read.values())
    loads_all(tmp_path / 'a.pth')
