"""Find the files of a checkpoint from what a user names: a file, a folder, a Hub id, a URL or a short name"""

import difflib
import os
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from ..checks import clip
from ..redaction import redact, redact_error
from ..run_folder import BEST_STATE_NAME, BEST_WEIGHTS_NAME, CONFIG_NAME, LAST_STATE_NAME, WEIGHTS_NAME
from .download import download
from .reading.configs import FOLDER, describe, read_json_file
from .report import few
from .sniff import file_size, sniff

# Names of weights in a folder: the first one that is there is taken. An index lists the files (shards) that a state
# dict is split into. A run that was cut off has its states of training only.
WEIGHTS = (
    WEIGHTS_NAME, 'model.safetensors.index.json', 'open_clip_model.safetensors', 'pytorch_model.bin',
    'pytorch_model.bin.index.json', 'open_clip_pytorch_model.bin', BEST_WEIGHTS_NAME, BEST_STATE_NAME, LAST_STATE_NAME,
)  # fmt: skip
EXTENSIONS = ('.safetensors', '.pth', '.pth.tar', '.pt', '.ckpt', '.bin', '.npz')
HUB_PREFIXES = ('hf-hub:', 'hf_hub:')
CONFIGS = (CONFIG_NAME, 'preprocessor_config.json', 'open_clip_config.json')


class Release(NamedTuple):
    """A well-known public checkpoint that has a short name.

    Attributes:
        url: URL of the file.
        model: timm model that the checkpoint fits.
        licence: Licence of the weights. It is the publisher's and binds whoever uses them; some forbid commercial use.
        paper: arXiv number of the paper.
        source: Repository and file in which the publisher states the URL and the licence.
    """

    url: str
    model: str
    licence: str
    paper: str
    source: str


_FB = 'https://dl.fbaipublicfiles.com/'
_NC = 'CC-BY-NC-4.0'
_APACHE = 'Apache-2.0'

RELEASES: Dict[str, Release] = {
    'mocov1_resnet50': Release(_FB + 'moco/moco_checkpoints/moco_v1_200ep/moco_v1_200ep_pretrain.pth.tar',
                               'resnet50', _NC, '1911.05722', 'facebookresearch/moco README.md'),
    'mocov2_resnet50': Release(_FB + 'moco/moco_checkpoints/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar',
                               'resnet50', _NC, '2003.04297', 'facebookresearch/moco README.md'),
    'mocov2_resnet50_200ep': Release(_FB + 'moco/moco_checkpoints/moco_v2_200ep/moco_v2_200ep_pretrain.pth.tar',
                                     'resnet50', _NC, '2003.04297', 'facebookresearch/moco README.md'),
    'mocov3_resnet50': Release(_FB + 'moco-v3/r-50-1000ep/r-50-1000ep.pth.tar',
                               'resnet50', _NC, '2104.02057', 'facebookresearch/moco-v3 CONFIG.md, README.md'),
    'mocov3_vits16': Release(_FB + 'moco-v3/vit-s-300ep/vit-s-300ep.pth.tar', 'vit_small_patch16_224, num_heads=12',
                             _NC, '2104.02057', 'facebookresearch/moco-v3 CONFIG.md, README.md'),
    'mocov3_vitb16': Release(_FB + 'moco-v3/vit-b-300ep/vit-b-300ep.pth.tar', 'vit_base_patch16_224',
                             _NC, '2104.02057', 'facebookresearch/moco-v3 CONFIG.md, README.md'),
    'simsiam_resnet50': Release(_FB + 'simsiam/models/100ep/pretrain/checkpoint_0099.pth.tar',
                                'resnet50', _NC, '2011.10566', 'facebookresearch/simsiam README.md'),
    'swav_resnet50': Release(_FB + 'deepcluster/swav_800ep_pretrain.pth.tar',
                             'resnet50', _NC, '2006.09882', 'facebookresearch/swav README.md, LICENSE'),
    'deepclusterv2_resnet50': Release(_FB + 'deepcluster/deepclusterv2_800ep_pretrain.pth.tar',
                                      'resnet50', _NC, '2006.09882', 'facebookresearch/swav README.md, LICENSE'),
    'barlowtwins_resnet50': Release(
        _FB + 'barlowtwins/epochs1000_bs2048_lr0.2_lambd0.0051_proj_8192_8192_8192_scale0.024/resnet50.pth',
        'resnet50', _NC, '2103.03230', 'facebookresearch/barlowtwins README.md'),
    'vicreg_resnet50': Release(_FB + 'vicreg/resnet50.pth',
                               'resnet50', 'MIT', '2105.04906', 'facebookresearch/vicreg README.md'),
    'dino_resnet50': Release(_FB + 'dino/dino_resnet50_pretrain/dino_resnet50_pretrain.pth',
                             'resnet50', _APACHE, '2104.14294', 'facebookresearch/dino hubconf.py'),
    'dino_vits16': Release(_FB + 'dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth',
                           'vit_small_patch16_224', _APACHE, '2104.14294', 'facebookresearch/dino hubconf.py'),
    'dino_vits8': Release(_FB + 'dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth',
                          'vit_small_patch8_224', _APACHE, '2104.14294', 'facebookresearch/dino hubconf.py'),
    'dino_vitb16': Release(_FB + 'dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth',
                           'vit_base_patch16_224', _APACHE, '2104.14294', 'facebookresearch/dino hubconf.py'),
    'dino_vitb8': Release(_FB + 'dino/dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth',
                          'vit_base_patch8_224', _APACHE, '2104.14294', 'facebookresearch/dino hubconf.py'),
    'mae_vitb16': Release(_FB + 'mae/pretrain/mae_pretrain_vit_base.pth',
                          'vit_base_patch16_224', _NC, '2111.06377', 'facebookresearch/mae README.md'),
    'mae_vitl16': Release(_FB + 'mae/pretrain/mae_pretrain_vit_large.pth',
                          'vit_large_patch16_224', _NC, '2111.06377', 'facebookresearch/mae README.md'),
    'dinov2_vits14': Release(_FB + 'dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth',
                             'vit_small_patch14_dinov2', _APACHE, '2304.07193', 'facebookresearch/dinov2 README.md'),
    'dinov2_vits14_reg': Release(_FB + 'dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth',
                                 'vit_small_patch14_reg4_dinov2', _APACHE, '2309.16588',
                                 'facebookresearch/dinov2 README.md'),
    'dinov2_vitb14': Release(_FB + 'dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth',
                             'vit_base_patch14_dinov2', _APACHE, '2304.07193', 'facebookresearch/dinov2 README.md'),
    'dinov2_vitb14_reg': Release(_FB + 'dinov2/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth',
                                 'vit_base_patch14_reg4_dinov2', _APACHE, '2309.16588',
                                 'facebookresearch/dinov2 README.md'),
}  # fmt: skip


class Files(NamedTuple):
    """The files of a checkpoint on this machine.

    Attributes:
        paths: Files of the weights; several if the state dict is split into shards.
        config: Contents of the JSON files beside the weights, by file name.
    """

    paths: Tuple[str, ...]
    config: Dict[str, Any]


def resolve_source(source: str, described: bool = False) -> Files:
    """Find the files of a checkpoint, and download those that are not on this machine.

    Args:
        source: Path of a file or folder, `hf-hub:owner/name[/file][@revision]`, a URL, or a short name, a key of
            RELEASES.
        described: Read the config.json beside a single file too, if it is one of timm.

    Raises:
        ValueError: There is no checkpoint, or a folder holds more than one.
    """
    if os.path.isdir(source):
        return _from_folder(source)
    if os.path.lexists(source):
        if source.endswith('.index.json') or sniff(source) == 'index':
            return Files(_shards(source), _configs(os.path.dirname(source) or '.'))
        return Files((source,), _timm_config(os.path.dirname(source) or '.') if described else {})
    hub_id = hub_id_of(source)
    if hub_id is not None:
        return _from_hub(hub_id)
    if '://' in source:
        return Files((download(source),), {})
    if source in RELEASES:
        return Files((download(RELEASES[source].url),), {})
    names = ', '.join(difflib.get_close_matches(source, RELEASES, 3) or RELEASES)
    raise ValueError(
        f'Expected a checkpoint file or folder, found none at {redact(source)!r}. Check the path. A model of the '
        f'Hub is written hf-hub:owner/name, a published file as its URL or its short name ({names}).'
    )


def hub_id_of(source: str) -> Optional[str]:
    """Return owner/name[@revision] if the source is on the Hub, else None."""
    return next((source[len(prefix) :] for prefix in HUB_PREFIXES if source.startswith(prefix)), None)


def explain_hub_error(hub_id: str, error: Exception) -> str:
    """Error message for an error of the Hub's client or of the HTTP library that it uses."""
    redact_error(error)
    message = redact((str(error).strip() or 'no message').splitlines()[0])
    return (
        f'Expected a repository of the Hub in hf-hub:{hub_id}, got {type(error).__name__}: {message}. Check its '
        'name and the connection. A private repository needs `hf auth login`.'
    )


def download_from_hub(hub_id: str, name: str) -> Optional[str]:
    """Download a file into the cache of the Hub.

    Args:
        hub_id: Repository, OWNER/NAME or OWNER/NAME@REVISION.
        name: The file in it.

    Returns:
        Path of the file, None if the repository has no such file.

    Raises:
        ValueError: There is no such repository, or the Hub cannot be reached.
    """
    repo_id, _, revision = hub_id.partition('@')
    try:
        return huggingface_hub.hf_hub_download(repo_id, name, revision=revision or None)
    except Exception as e:  # the HTTP library has errors of its own, and differs between versions of the client
        # without a connection the cache may lack a file that the repository has
        if isinstance(e, EntryNotFoundError) and not isinstance(e, LocalEntryNotFoundError):
            return None
        raise ValueError(explain_hub_error(hub_id, e)) from e


def same_commit(hub_id: str, path: str) -> str:
    """The repository at the commit from which a file was downloaded, as somebody may push before the next one."""
    return f'{hub_id.partition("@")[0]}@{Path(path).parent.name}'  # the id of the commit names the folder in the cache


def _from_folder(folder: str, name_of_file: str = '') -> Files:
    """Find the one checkpoint in a folder and the configs beside it.

    Args:
        folder: The folder.
        name_of_file: How a user writes one file of it, '' if by its path.
    """
    try:
        names = set(os.listdir(folder))
    except OSError as e:
        raise ValueError(f'Expected a folder with a checkpoint in {folder!r}, cannot read it: {e.strerror}.') from e
    if '.metadata' in names or any(name.endswith('.distcp') for name in names):
        raise ValueError(
            f'Expected one checkpoint in {folder!r}, got a distributed checkpoint of torch. Merge it first: '
            f'python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} merged.pth'
        )
    found = next((name for name in WEIGHTS if name in names), None)
    if found is None:
        files = sorted(name for name in names if name.endswith(EXTENSIONS))
        if len(files) != 1:
            raise ValueError(
                f'Expected one checkpoint in {folder!r}, found {few(files, 20)}. '
                f'{f"Name the file to load: {name_of_file}" if name_of_file else "Give the path of the file to load"}.'
            )
        found = files[0]
    path = os.path.join(folder, found)
    return Files(_shards(path) if found.endswith('.json') else (path,), _configs(folder))


def _shards(index: str) -> Tuple[str, ...]:
    """Paths of the files that an index lists. Files outside the folder of the index are refused."""
    folder = os.path.dirname(index) or '.'
    content = read_json_file(index, file_size(index))
    weight_map = content.get('weight_map') if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(n, str) and '\0' not in n for n in weight_map.values()):
        raise ValueError(
            f"Expected an index with a 'weight_map' of tensors to files in {index!r}, got {clip(repr(content), 60)}. "
            'Get it again.'
        )
    names = sorted(set(weight_map.values()))
    if not names:
        raise ValueError(f'Expected an index that lists files in {index!r}, it lists none. Get it again.')
    inside = [os.path.realpath(folder)]
    if Path(inside[0]).parent.name == 'snapshots':  # in the Hub's cache these are links to blobs
        inside.append(os.path.join(Path(inside[0]).parents[1], 'blobs'))
    paths: List[str] = []
    for name in names:
        path = os.path.join(folder, name)
        real = os.path.realpath(path)
        if os.path.dirname(real) not in inside:
            raise ValueError(
                f'Expected shards inside {folder!r}, but its index leads to {clip(name)!r} outside of it. '
                'Copy the shards into the folder, if you trust them.'
            )
        if not os.path.isfile(path):
            raise ValueError(f'Expected all shards of {index!r}, {clip(name)!r} is missing. Get it too.')
        paths.append(path)
    return tuple(paths)


def _configs(folder: str, names: Tuple[str, ...] = CONFIGS) -> Dict[str, Any]:
    """Contents of the JSON configs in a folder, by file name."""
    configs: Dict[str, Any] = {}
    for name in names:
        path = os.path.join(folder, name)
        if os.path.lexists(path):
            configs[name] = read_json_file(path, file_size(path))
            configs[FOLDER] = folder
    describe(configs)  # refuses values that no model has
    return configs


def _timm_config(folder: str) -> Dict[str, Any]:
    """The config.json in a folder, under its name, if timm or this package wrote it. It may be of other files."""
    config = _configs(folder, (CONFIG_NAME,))
    return config if describe(config) else {}


def split_hub_id(hub_id: str) -> Tuple[str, str, str]:
    """Split owner/name[/file][@revision] into owner/name, file and revision. What is not there is ''."""
    name, _, revision = hub_id.partition('@')
    parts = name.split('/')
    return '/'.join(parts[:2]), '/'.join(parts[2:]), revision


def _from_hub(hub_id: str) -> Files:
    """Find the one checkpoint of a Hub repository, or the file of it that is named, and download it."""
    repo_id, file, revision = split_hub_id(hub_id)
    folder = _snapshot(hub_id)
    if not file:
        return _from_folder(folder, f'hf-hub:{repo_id}/FILE{"@" if revision else ""}{revision}')
    path = os.path.join(folder, file)
    if not os.path.isfile(path):
        raise ValueError(f'Expected {file!r} of {repo_id!r} in the cache of the Hub, as the Hub does not answer.')
    return Files(_shards(path) if file.endswith('.index.json') else (path,), _configs(os.path.dirname(path)))


def _snapshot(hub_id: str) -> str:
    """Download one checkpoint of a Hub repository with its configs, or find it in the cache, and return its folder."""
    repo_id, file, revision = split_hub_id(hub_id)
    options: Dict[str, Any] = dict(revision=revision or None)
    try:
        names = huggingface_hub.list_repo_files(repo_id, **options)
        weights = file or _choose_weights(names, hub_id)
        if weights in names:
            start = weights.rpartition('/')[0] and weights.rpartition('/')[0] + '/'
            wanted = [*(start + name for name in CONFIGS), weights]
            if weights.endswith('.json'):
                wanted.append(weights.replace('model', 'model-*').replace('.index.json', ''))
            return huggingface_hub.snapshot_download(repo_id, allow_patterns=wanted, **options)
    except _AmbiguousError:
        raise
    except Exception as e:  # the HTTP library, and so its exceptions, depends on the version of the client
        try:
            return huggingface_hub.snapshot_download(repo_id, local_files_only=True, **options)
        except Exception:
            raise ValueError(explain_hub_error(hub_id, e)) from e
    found = few([name for name in names if name.endswith(EXTENSIONS)], 20)
    raise ValueError(f'Expected the file {file!r} in the Hub repository {repo_id!r}, its weights are: {found}.')


class _AmbiguousError(ValueError):
    """A repository does not have exactly one checkpoint."""


def _choose_weights(names: List[str], hub_id: str) -> str:
    """Choose among the files of a repository: those in WEIGHTS first, else the only one with weights at its top."""
    known = next((name for name in WEIGHTS if name in names), None)
    if known is not None:
        return known
    files = [name for name in names if name.endswith(EXTENSIONS)]
    at_top = [name for name in files if '/' not in name]
    if len(at_top) == 1:
        return at_top[0]
    repo_id, _, revision = split_hub_id(hub_id)
    raise _AmbiguousError(
        f'Expected one checkpoint at the top of the Hub repository {hub_id!r}, found {few(at_top or files, 20)}'
        f'{"" if at_top else " below it" if files else ""}. '
        f'Name the file to load: hf-hub:{repo_id}/FILE{"@" if revision else ""}{revision}.'
    )
