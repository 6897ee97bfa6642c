"""Checkpoints of all kinds, each damaged in one way that a seed and a number determine

`make_case(number, folder)` writes one. The kinds take turns, so any row of numbers has all of them.
"""

import collections
import datetime
import io
import json
import os
import pickle
import random
import socket
import struct
import types
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

import numpy as np
import timm
import torch
from safetensors.torch import save

SEED = 14
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]


class Case(NamedTuple):
    """A damaged checkpoint.

    Attributes:
        kind: What it is without the damage.
        damage: How it was damaged.
        path: File or folder to load.
        model: timm model to load it into.
        options: Arguments of load_checkpoint.
    """

    kind: str
    damage: str
    path: str
    model: str
    options: Dict[str, Any]


class Command:
    """Unpickling this runs a command, and the file `marker` shows that it did."""

    def __reduce__(self) -> Tuple[Any, ...]:
        return os.system, ('touch marker',)


class AttributeDict(dict):
    """A dictionary as EasyDict and many others."""


class Callback:
    """A class of a library that the reader does not have."""


def weights(model: str = 'test_resnet') -> Dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in _model(model).state_dict().items()}
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


_MODELS: Dict[str, torch.nn.Module] = {}


def _model(name: str) -> torch.nn.Module:
    if name not in _MODELS:
        _MODELS[name] = timm.create_model(name, num_classes=3)
    return _MODELS[name]


# damage of bytes


def _flip(content: bytearray, draw: random.Random) -> bytearray:
    for _ in range(draw.choice((1, 1, 4, 64))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return content


def _flip_start(content: bytearray, draw: random.Random) -> bytearray:
    for _ in range(draw.choice((1, 2, 8))):
        content[draw.randrange(min(len(content), 300))] = draw.randrange(256)
    return content


def _flip_end(content: bytearray, draw: random.Random) -> bytearray:
    for _ in range(draw.choice((1, 2, 8))):
        content[-1 - draw.randrange(min(len(content), 300))] = draw.randrange(256)
    return content


def _cut(content: bytearray, draw: random.Random) -> bytearray:
    return content[: draw.randrange(len(content))]


def _splice(content: bytearray, draw: random.Random) -> bytearray:
    start, length, target = draw.randrange(len(content)), draw.randrange(1, 400), draw.randrange(len(content))
    piece = content[start : start + length]
    if draw.random() < 0.5:
        content[target : target + len(piece)] = piece
    else:
        content[target:target] = piece
    return content


def _drop(content: bytearray, draw: random.Random) -> bytearray:
    start = draw.randrange(len(content))
    del content[start : start + draw.randrange(1, 400)]
    return content


BYTES: Dict[str, Callable[[bytearray, random.Random], bytearray]] = {
    'bits flipped': _flip,
    'start changed': _flip_start,
    'end changed': _flip_end,
    'cut': _cut,
    'spliced': _splice,
    'piece dropped': _drop,
}

# damage of what a file holds: tensors by name


def _keys(state: Dict[Any, Any], draw: random.Random) -> None:
    for _ in range(draw.choice((1, 3, 20))):
        key = draw.choice([key for key in state if isinstance(key, str)])
        value = state.pop(key)
        new = draw.choice((None, key + 'x', key.upper(), key[: len(key) // 2], '', '.', 'a\nb' + key, '\x1b[31m' + key,
                           '../' + key, key * 40, 'é' + key, key.replace('.', '..')))  # fmt: skip
        if new is not None:
            state[new] = value


def _long_keys(state: Dict[Any, Any], draw: random.Random) -> None:
    count = draw.choice((29_000, 60_000))
    key = draw.choice(('k' * count, '.' * count, 'a.' * (count // 2) + 'weight', '\n' * count))
    state[key] = torch.zeros(2)


def _deep_keys(state: Dict[Any, Any], draw: random.Random) -> None:
    prefix = draw.choice(('a.', 'module.', 'blocks.')) * draw.choice((20, 45, 3_000))
    for key in list(state):
        state[prefix + key] = state.pop(key)


def _many_tensors(state: Dict[Any, Any], draw: random.Random) -> None:
    name = draw.choice(('x{}', 'layer1.{}.conv1.weight', 'blocks.{}.attn.qkv.weight', 'b{}.c{}.d'))
    for number in range(draw.choice((300, 3_000))):
        state[name.format(number, number % 7)] = torch.zeros(1)


def _shapes(state: Dict[Any, Any], draw: random.Random) -> None:
    for _ in range(draw.choice((1, 3, 20))):
        key = draw.choice([key for key in state if isinstance(state[key], torch.Tensor)])
        tensor = state[key]
        count = tensor.numel()
        others = [
            tensor.flatten(), tensor.reshape(1, count), tensor.reshape(count, 1, 1, 1, 1), tensor.reshape(-1)[:0],
            tensor.reshape(-1)[: count // 2 + 1].clone(), tensor[None], tensor.sum(), tensor.reshape(1, 1, 1, count),
        ]  # fmt: skip
        if tensor.ndim:
            others += [tensor.transpose(0, -1).contiguous(), torch.cat([tensor, tensor])]
        state[key] = draw.choice(others)


def _dtypes(state: Dict[Any, Any], draw: random.Random) -> None:
    kinds = (torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool, torch.complex64,
             torch.uint8, torch.float8_e4m3fn)  # fmt: skip
    kind = draw.choice(kinds)
    for key in draw.sample(list(state), draw.choice((1, 5, len(state)))):
        state[key] = state[key].to(kind)


def _values(state: Dict[Any, Any], draw: random.Random) -> None:
    value = draw.choice((float('nan'), float('inf'), -float('inf'), 1e38, 0))
    key = draw.choice([key for key in state if state[key].numel()])
    state[key] = state[key].clone()
    state[key].view(-1)[draw.randrange(state[key].numel())] = value


def _huge_patches(state: Dict[Any, Any], draw: random.Random) -> None:
    side = draw.choice((32, 100, 160))
    state['patch_embed.proj.weight'] = torch.rand(draw.choice(((1, 1), (1, 3))) + (side, side))
    state['pos_embed'] = torch.rand(1, draw.choice((2, 65, 5000)), 64)


STATES: Dict[str, Callable[[Dict[Any, Any], random.Random], None]] = {
    'keys changed': _keys,
    'long key': _long_keys,
    'deep keys': _deep_keys,
    'many tensors': _many_tensors,
    'shapes changed': _shapes,
    'dtypes changed': _dtypes,
    'values changed': _values,
    'huge patches': _huge_patches,
}

# what only a pickle can hold


def _attributes(state: Dict[Any, Any], draw: random.Random) -> None:
    planted = draw.choice((
        [torch.zeros(3)], (torch.zeros(1).expand(2**40),), [torch.zeros(1).expand(2**20, 2**20)], 7, {'a': 1},
        [torch.zeros(2), torch.zeros(5, 5)],
    ))  # fmt: skip
    for key in draw.sample(list(state), draw.choice((1, 14))):
        state[key] = state[key].clone()
        setattr(state[key], draw.choice(('parts', 'names_', 'is_meta_', '__dict__x')), planted)


def _objects(state: Dict[Any, Any], draw: random.Random) -> None:
    nested: Any = torch.zeros(1)
    for _ in range(draw.choice((5, 100))):
        nested = draw.choice((lambda v: (v,), lambda v: [v], lambda v: {'a': v}))(nested)
    itself: Dict[str, Any] = {}
    itself['itself'] = itself
    planted = (
        collections.defaultdict(list, a=[1]), collections.deque([1, 2]), datetime.datetime(2020, 1, 1),
        types.SimpleNamespace(a=1), AttributeDict(a=1), Callback, Callback(), Command(), np.float64(1), np.arange(3),
        {1: 2, (1, 2): 3}, {Callback: {'best': 1}}, {1, 2}, frozenset((1,)), 10**4000, 'x' * 10**5, b'y' * 10**5,
        nested,
        itself, torch.device('cuda'), torch.float16, torch.Size((1, 2)), complex(1, 2), Path('a'), range(3), slice(1),
        torch.zeros(3).to_sparse(), torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), bytearray(9),
        np.array(['a', None], dtype=object), np.zeros(2, dtype=[('a', 'f4')]), torch.Generator().get_state(),
        torch.nn.Linear(2, 2), collections.Counter('aab'), torch.zeros(1).expand(2**45), torch.zeros(1, device='meta'),
    )  # fmt: skip
    for number in range(draw.choice((1, 3))):
        state[draw.choice((f'object{number}', 'conv1.0.weight', 7, None))] = draw.choice(planted)


def _arrays(state: Dict[Any, Any], draw: random.Random) -> None:
    order = draw.choice(('<', '>'))
    for key in draw.sample(list(state), draw.choice((3, len(state)))):
        state[key] = np.asarray(state[key].numpy(), dtype=f'{order}f4', order=draw.choice('CF'))


OBJECTS = {'attributes planted': _attributes, 'objects planted': _objects, 'arrays of numpy': _arrays}


def _program(draw: random.Random) -> bytes:
    """A pickle that asks for much memory or time."""
    storage = b'(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ'
    huge = b'\x8a\x08' + struct.pack('<q', draw.choice((2**40, 2**62, -1, -(2**40), 7)))

    def tensor(offset: bytes, size: bytes, stride: bytes) -> bytes:
        return b'ctorch._utils\n_rebuild_tensor_v2\n(' + storage + offset + size + stride + b'\x89}tR'

    program = draw.choice((
        b'r' + struct.pack('<I', 2**32 - 1),
        b'\x8e' + struct.pack('<Q', 2**40),
        b'\x96' + struct.pack('<Q', 2**40),
        b'\x8b' + struct.pack('<i', 2**30),
        b'cbuiltins\nbytearray\n' + huge + b'\x85R',
        b'cbuiltins\nrange\n' + huge + b'\x85Rcbuiltins\nlist\nq\x01\x85R',
        b'(' * 200_000 + b't' * 200_000,
        b']' * 300_000,
        b')\x85' + b'\x85' * 300_000,
        b']q\x00' + b'h\x00h\x00\x86q\x00' * 100_000,
        b'](' + b'N' * 20_000 + b'eq\x00' + b'ccollections\nOrderedDict\nh\x00\x85R0' * 20_000,
        b'X' + struct.pack('<I', 100_000) + b'a' * 100_000 + b'q\x00'
        + b'c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R0' * 5_000,
        b'}X\x01\x00\x00\x00aq\x00' + tensor(b'K\x00', huge + b'\x85', b'K\x00\x85') + b's',
        b'}X\x01\x00\x00\x00aq\x00' + tensor(huge, b'K\x01\x85', b'K\x01\x85') + b's',
        b'}X\x01\x00\x00\x00aq\x00' + tensor(b'K\x00', b'K\x02\x85', huge + b'\x85') + b's',
        b'}X\x01\x00\x00\x00aq\x00' + tensor(b'K\x00', *2 * [b'(' + b'K\x01' * 100 + b't']) + b's',
        b'cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR(K\x01' + huge
        + b'\x85cnumpy\ndtype\nX\x02\x00\x00\x00f8\x89\x88\x87R\x89C\x08aaaaaaaatb',
        b'ctorch\nempty\n' + huge + b'\x85R',
        b'ctorch.hub\nload\nX\x01\x00\x00\x00a\x85R',
        b'cargparse\nNamespace\n)\x81}X\x08\x00\x00\x00__init__Nsb',
        b'cbuiltins\neval\nX\x01\x00\x00\x001\x85R',
        b'\x82\x01', b'I' + b'9' * 100_000 + b'\n', b'P1\n', b'0' * 10, b'N' * 10 + b'u', b'b', b'R', b'Q', b'e',
    ))  # fmt: skip
    return b'\x80\x04' + program + b'.'


# files


def _zip(state: Any) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def _legacy(state: Any) -> bytes:
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def _pickle(state: Any) -> bytes:
    """A pickle of arrays. Tensors that numpy cannot hold, and those larger than their memory, are left out."""
    arrays = {}
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            arrays[key] = value
            continue
        is_plain = value.dtype == torch.float32 and value.device.type == 'cpu' and value.layout == torch.strided
        if is_plain and value.numel() <= value.untyped_storage().nbytes():
            arrays[key] = value.numpy()
    return pickle.dumps(arrays, protocol=4)


def _safetensors(state: Dict[str, torch.Tensor]) -> bytes:
    return save({k: v.contiguous() for k, v in state.items()}, {'format': 'pt'})


def _zip_again(content: bytes, draw: random.Random, change: Callable[[str, bytes], bytes] = lambda n, c: c) -> bytes:
    """Pack an archive again, in another way or with changed entries."""
    file = io.BytesIO()
    method = draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    root = draw.choice(('archive/', 'other name/', '', 'a/b/'))
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, 'w', method) as new:
        for name in old.namelist():
            new.writestr(root + name.partition('/')[2], change(name, old.read(name)))
    return file.getvalue()


def _jax_archive() -> Dict[str, np.ndarray]:
    """Weights of test_vit with the names of big_vision."""
    draw = np.random.default_rng(0)
    model: Any = _model('test_vit')
    width, heads, hidden = 64, model.blocks[0].attn.num_heads, model.blocks[0].mlp.fc1.out_features
    size = model.patch_embed.patch_size[0]
    shapes: Dict[str, Tuple[int, ...]] = {
        'embedding/kernel': (size, size, 3, width), 'embedding/bias': (width,), 'cls': (1, 1, width),
        'Transformer/posembed_input/pos_embedding': tuple(model.pos_embed.shape),
        'Transformer/encoder_norm/scale': (width,), 'Transformer/encoder_norm/bias': (width,),
    }  # fmt: skip
    for number in range(len(model.blocks)):
        block = f'Transformer/encoderblock_{number}/'
        for norm in ('LayerNorm_0', 'LayerNorm_2'):
            shapes.update({f'{block}{norm}/scale': (width,), f'{block}{norm}/bias': (width,)})
        for part in ('query', 'key', 'value'):
            shapes[f'{block}MultiHeadDotProductAttention_1/{part}/kernel'] = (width, heads, width // heads)
            shapes[f'{block}MultiHeadDotProductAttention_1/{part}/bias'] = (heads, width // heads)
        shapes[f'{block}MultiHeadDotProductAttention_1/out/kernel'] = (heads, width // heads, width)
        shapes[f'{block}MultiHeadDotProductAttention_1/out/bias'] = (width,)
        shapes.update(
            {f'{block}MlpBlock_3/Dense_0/kernel': (width, hidden), f'{block}MlpBlock_3/Dense_0/bias': (hidden,)}
        )
        shapes.update(
            {f'{block}MlpBlock_3/Dense_1/kernel': (hidden, width), f'{block}MlpBlock_3/Dense_1/bias': (width,)}
        )
    return {name: draw.random(shape, dtype=np.float32) for name, shape in shapes.items()}


def _npz(draw: random.Random, damage: str) -> bytes:
    arrays: Dict[str, Any] = _jax_archive()
    if damage == 'arrays changed':
        for name in draw.sample(sorted(arrays), 3):
            arrays[name] = draw.choice((
                arrays[name].reshape(-1), arrays[name].astype('>f8'), arrays[name].astype('S4'), np.zeros(0),
                np.array([None, {}], dtype=object), arrays[name][..., :1], np.zeros((1,) * 20), np.float32(1),
            ))  # fmt: skip
    file = io.BytesIO()
    np.savez(file, **arrays)
    if damage != 'npy headers changed':
        return file.getvalue()

    def change(name: str, content: bytes) -> bytes:
        if draw.random() < 0.8:
            return content
        length = int.from_bytes(content[8:10], 'little')
        text = draw.choice((
            b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }", b'{' * 60_000, b'(' * 300, b'',
            b"{'descr': '|O', 'fortran_order': False, 'shape': (2,), }", b'__import__("os").system("touch marker")',
            b"{'descr': '<f4', 'fortran_order': 7, 'shape': (-1, 2), }", b'\xff\xfe' * 20, b'9' * 5000,
        ))  # fmt: skip
        return content[:8] + (len(text) + 1).to_bytes(2, 'little') + text + b'\n' + content[10 + length :]

    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(file.getvalue())) as old, zipfile.ZipFile(packed, 'w') as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return packed.getvalue()


def _values_of(draw: random.Random) -> Any:
    """A value that a JSON file may have where another was expected."""
    return draw.choice((
        None, True, -1, 0, 10**400, 1e999, float('nan'), '', 'x' * 50_000, 'a\nb', [], [[]], [1], ['a', 'b', 'c'], {},
        {'a': {}}, [0.5, 0.5, float('nan')], [0, 0, 0], [-1, 1, 1], [1e30] * 3, [0.5] * 3, [0.5] * 1000, 2**40, 0.5,
    ))  # fmt: skip


def _edit(config: Any, draw: random.Random) -> Any:
    """Change one value of nested dictionaries, or the whole."""
    if not config or draw.random() < 0.1:
        return _values_of(draw)
    node = config
    while True:
        key = draw.choice(sorted(node))
        if not isinstance(node[key], dict) or not node[key] or draw.random() < 0.2:
            node[key] = _values_of(draw)
            return config
        node = node[key]


CONFIG = {
    'architecture': 'test_resnet',
    'num_classes': 3,
    'label_names': ['a', 'b', 'c'],
    'model_args': {'in_chans': 3, 'num_classes': 3, 'drop_rate': 0.1, 'global_pool': 'avg'},
    'pretrained_cfg': {'input_size': [3, 64, 64], 'mean': MEAN, 'std': STD, 'interpolation': 'bicubic',
                       'crop_pct': 0.9, 'crop_mode': 'center', 'file': '', 'url': ''},
}  # fmt: skip
PREPROCESSOR = {'image_mean': MEAN, 'image_std': STD, 'size': {'height': 64}}
TRANSFORMERS = {'model_type': 'vit', 'hidden_act': 'gelu', 'num_attention_heads': 1, 'layer_norm_eps': 1e-6,
                'vision_config': {'hidden_act': 'gelu', 'num_attention_heads': 4, 'num_frames': 1},
                'downsample_in_bottleneck': False, 'layer_type': 'basic'}  # fmt: skip
OPEN_CLIP = {'model_cfg': {'quick_gelu': False, 'vision_cfg': {'layers': 2, 'width': 64, 'head_width': 64,
                                                               'norm_kwargs': {'eps': 1e-6}, 'act_kwargs': {}}},
             'preprocess_cfg': {'mean': MEAN, 'std': STD}}  # fmt: skip


def _edit_header(content: bytes, draw: random.Random) -> bytes:
    """Change the header of a safetensors file."""
    length = int.from_bytes(content[:8], 'little')
    header = json.loads(content[8 : 8 + length])
    for _ in range(draw.choice((1, 3))):
        entry = header[draw.choice(sorted(header))]
        entry[draw.choice(('shape', 'dtype', 'data_offsets', 'mean'))] = draw.choice((
            [2**40], [2**32, 2**32], [], [0], [0, 2**50], [8, 4], 'F64', 'F16', 'I8', 'F99', None, {}, [1] * 70, -1,
            '0 0 0',
        ))  # fmt: skip
    if draw.random() < 0.3:
        header['__metadata__'] = {
            'mean': draw.choice(('0 0 0', 'a', 'nan nan nan')),
            'std': draw.choice(('0 0 0', '1 1 1')),
        }
    text = json.dumps(header).encode()
    if draw.random() < 0.2:
        text = draw.choice((b'{' * 50_000, b'{"a":' * 20_000 + b'1', b'[]' + b' ' * 20, text + b' ' * 10**5, b'{}'))
    return len(text).to_bytes(8, 'little') + text + content[8 + length :]


def _place(path: Path, content: bytes, draw: random.Random) -> Path:
    """Put something else than a file in the place of a file."""
    what = draw.choice(('pipe', 'socket', 'link to nothing', 'link to itself', 'device', 'closed', 'folder', 'empty'))
    path.unlink(missing_ok=True)
    if what == 'pipe':
        os.mkfifo(path)
    elif what == 'socket':
        short = os.open(path.parent, os.O_RDONLY)  # the path of a socket has at most 107 characters
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f'/proc/self/fd/{short}/{path.name}')
        os.close(short)
    elif what == 'link to nothing':
        path.symlink_to(path.parent / 'nothing')
    elif what == 'link to itself':
        path.symlink_to(path)
    elif what == 'device':
        path.symlink_to(draw.choice(('/dev/zero', '/dev/full', '/dev/tty')))
    elif what == 'folder':
        path.mkdir()
    else:
        path.write_bytes(b'' if what == 'empty' else content)
        path.chmod(0 if what == 'closed' else 0o644)
    return path


def _single_file(
    writer: Callable[[Any], bytes], suffix: str, model: str = 'test_resnet'
) -> Callable[[str, random.Random, Path], Path]:
    def make(damage: str, draw: random.Random, folder: Path) -> Path:
        state: Dict[Any, Any] = weights(model)
        path = folder / f'checkpoint{suffix}'
        change = {**STATES, **OBJECTS}.get(damage)
        if change is not None:
            change(state, draw)
        content = writer(state if damage in OBJECTS or draw.random() < 0.5 or suffix == '.safetensors' else
                         {'state_dict': state, 'epoch': 3})  # fmt: skip
        if damage in BYTES:
            content = bytes(BYTES[damage](bytearray(content), draw))
        elif damage == 'packed again':
            content = _zip_again(content, draw)
        elif damage == 'pickle changed':
            damaged = BYTES[draw.choice(sorted(BYTES))]
            content = _zip_again(
                content, draw, lambda n, c: bytes(damaged(bytearray(c), draw)) if n.endswith('data.pkl') else c
            )
        elif damage == 'hostile pickle':
            program = _program(draw)
            content = (
                program
                if writer is _pickle
                else _zip_again(content, draw, lambda n, c: program if n.endswith('data.pkl') else c)
            )
        elif damage == 'header changed':
            content = _edit_header(content, draw)
        path.write_bytes(content)
        return _place(path, content, draw) if damage == 'no file' else path

    return make


def _make_npz(damage: str, draw: random.Random, folder: Path) -> Path:
    path = folder / 'checkpoint.npz'
    content = _npz(draw, damage)
    path.write_bytes(bytes(BYTES[damage](bytearray(content), draw)) if damage in BYTES else content)
    return path


def _make_folder(damage: str, draw: random.Random, folder: Path) -> Path:
    """Weights with the configs of timm, of transformers or of open_clip beside them."""
    path = folder / 'model'
    path.mkdir()
    content = _safetensors(weights())
    (path / draw.choice(('model.safetensors', 'model_best.safetensors'))).write_bytes(content)
    config = json.loads(json.dumps(draw.choice((CONFIG, TRANSFORMERS))))
    configs = {'config.json': config, 'preprocessor_config.json': dict(PREPROCESSOR)}
    if draw.random() < 0.3:
        configs['open_clip_config.json'] = json.loads(json.dumps(OPEN_CLIP))
    name = draw.choice(sorted(configs))
    if damage == 'config changed':
        for _ in range(draw.choice((1, 1, 4))):
            configs[name] = _edit(configs[name], draw) if isinstance(configs[name], dict) else configs[name]
    elif damage == 'arguments planted':
        args = draw.choice((
            {'checkpoint_path': '/etc/passwd'}, {'pretrained': True}, {'depth': 10**6}, {'layers': [10**6] * 4},
            {'pretrained_cfg': {'file': '/etc/passwd'}}, {'in_chans': 0}, {'width': 10**9}, {'img_size': 10**9},
            {'norm_layer': 'x'}, {'cache_dir': '/'},
        ))  # fmt: skip
        architecture = draw.choice(('test_resnet', 'resnet18', 'hf-hub:a/b', 'x/../y'))
        configs['config.json'] = {**CONFIG, 'architecture': architecture, 'model_args': args}
    for file, value in configs.items():
        (path / file).write_text(json.dumps(value))
    if damage == 'config damaged':
        text = bytearray((path / name).read_bytes())
        (path / name).write_bytes(
            draw.choice((b'', b'{' * 10**5, b'[' * 10**5, b'\xff\xfe', b'null', _flip(text, draw)))
        )
    elif damage == 'no file':
        _place(draw.choice([path / name, *path.glob('*.safetensors')]), content, draw)
    elif damage == 'files missing':
        for file in draw.sample(sorted(path.iterdir()), 2):
            file.unlink()
    return path


def _make_shards(damage: str, draw: random.Random, folder: Path) -> Path:
    path = folder / 'model'
    path.mkdir()
    items = sorted(weights().items())
    names = ['model-1.safetensors', 'model-2.safetensors']
    for name, part in zip(names, (items[:50], items[50:]), strict=True):
        (path / name).write_bytes(_safetensors(dict(part)))
    index: Any = {'metadata': {}, 'weight_map': {key: names[i >= 50] for i, (key, _) in enumerate(items)}}
    file = path / 'model.safetensors.index.json'
    if damage == 'index changed':
        index = _edit(index, draw)
        if isinstance(index, dict) and isinstance(index.get('weight_map'), dict) and draw.random() < 0.5:
            index['weight_map']['x'] = draw.choice(
                ('../x', '/etc/passwd', '', '\0', 7, None, [], file.name, 'n' * 5000)
            )
    file.write_text(json.dumps(index))
    if damage == 'no file':
        _place(path / draw.choice((*names, file.name)), b'', draw)
    elif damage in BYTES:
        target = path / draw.choice((*names, file.name))
        target.write_bytes(bytes(BYTES[damage](bytearray(target.read_bytes()), draw)))
    elif damage == 'files missing':
        (path / draw.choice(names)).unlink()
    return draw.choice((path, file))


class Kind(NamedTuple):
    make: Callable[[str, random.Random, Path], Path]
    damages: Tuple[str, ...]
    model: str = 'test_resnet'


KINDS: Dict[str, Kind] = {
    'torch, zip': Kind(_single_file(_zip, '.pth'), (
        *BYTES, *STATES, *OBJECTS, *OBJECTS, 'packed again', 'pickle changed', 'pickle changed', 'hostile pickle',
        'hostile pickle', 'no file')),
    'torch, zip, of a ViT': Kind(_single_file(_zip, '.pth', 'test_vit'), (
        'shapes changed', 'shapes changed', 'huge patches', 'keys changed', 'dtypes changed', 'many tensors'),
        'test_vit'),
    'torch, older format': Kind(_single_file(_legacy, '.pth.tar'), (*BYTES, *STATES, *OBJECTS, 'no file')),
    'pickle': Kind(_single_file(_pickle, '.pkl'), (*BYTES, 'keys changed', 'objects planted', 'hostile pickle')),
    'safetensors': Kind(_single_file(_safetensors, '.safetensors'), (
        *BYTES, *STATES, 'header changed', 'header changed', 'header changed', 'no file')),
    'npz': Kind(_make_npz, (*BYTES, 'arrays changed', 'npy headers changed', 'npy headers changed'), 'test_vit'),
    'folder with configs': Kind(_make_folder, (
        'config changed', 'config changed', 'config damaged', 'arguments planted', 'no file', 'files missing')),
    'shards': Kind(_make_shards, (*BYTES, 'index changed', 'index changed', 'no file', 'files missing')),
}  # fmt: skip
# how often each kind has its turn: those with more ways to be damaged more often
_TURNS: List[str] = ['torch, zip', 'safetensors', 'folder with configs', 'torch, zip', 'torch, older format', 'npz',
                     'shards', 'torch, zip', 'safetensors', 'folder with configs', 'pickle',
                     'torch, zip, of a ViT']  # fmt: skip


def make_case(number: int, folder: Path) -> Case:
    """Write the damaged checkpoint of a number into an empty folder."""
    draw = random.Random(f'{SEED}-{number}')
    name = _TURNS[number % len(_TURNS)]
    kind = KINDS[name]
    damage = draw.choice(kind.damages)
    torch.manual_seed(number)
    path = kind.make(damage, draw, folder)
    options = {'load_classifier': True} if draw.random() < 0.4 else {}
    if draw.random() < 0.1:
        options['allow_partial'] = True
    return Case(name, damage, str(path), kind.model, options)
