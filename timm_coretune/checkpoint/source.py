"""From what a user types to files on this machine: a file, a folder, a Hub id, a URL or a short name"""

import difflib
import json
import os
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import huggingface_hub

from .download import download
from .releases import RELEASES
from .sniff import sniff

# Weights in a folder, the first that is there counts; an index names the shards of a state dict
WEIGHTS = (
    'model.safetensors', 'model.safetensors.index.json', 'open_clip_model.safetensors', 'pytorch_model.bin',
    'pytorch_model.bin.index.json', 'open_clip_pytorch_model.bin',
)  # fmt: skip
EXTENSIONS = ('.safetensors', '.pth', '.pth.tar', '.pt', '.ckpt', '.bin', '.npz')
HUB_PREFIXES = ('hf-hub:', 'hf_hub:')
CONFIGS = ('config.json', 'preprocessor_config.json', 'open_clip_config.json')


class Files(NamedTuple):
    """Where a checkpoint lies.

    Attributes:
        paths: Its files, more than one where the state dict is in shards.
        config: What the JSON files beside it say, by file name.
    """

    paths: Tuple[str, ...]
    config: Dict[str, Any]


def resolve_source(source: str) -> Files:
    """Find the files of a checkpoint, downloading what is not here.

    Args:
        source: Path of a file or folder, `hf-hub:owner/name[@revision]`, a URL, or a short name of `releases.py`.

    Raises:
        ValueError: There is nothing, or more than one checkpoint.
    """
    if os.path.isdir(source):
        return _from_folder(source)
    if os.path.isfile(source):
        if source.endswith('.index.json') or sniff(source) == 'index':
            return Files(_shards(source), _configs(os.path.dirname(source) or '.'))
        return Files((source,), {})
    hub_id = hub_id_of(source)
    if hub_id is not None:
        return _from_folder(_snapshot(hub_id))
    if '://' in source:
        return Files((download(source),), {})
    if source in RELEASES:
        return Files((download(RELEASES[source].url),), {})
    names = ', '.join(difflib.get_close_matches(source, RELEASES, 3) or RELEASES)
    raise ValueError(
        f'Expected a checkpoint file or folder, found none at {source!r}. Check the path. A model of the Hub is '
        f'hf-hub:owner/name, a published file its URL or short name ({names}).'
    )


def hub_id_of(source: str) -> Optional[str]:
    """owner/name[@revision] of what is on the Hub, None for anything else."""
    return next((source[len(prefix) :] for prefix in HUB_PREFIXES if source.startswith(prefix)), None)


def explain_hub_error(hub_id: str, error: Exception) -> str:
    """What to tell of an error of the client of the Hub, or of the HTTP library below it."""
    return (
        f'Expected a repository of the Hub in hf-hub:{hub_id}, got {type(error).__name__}: '
        f'{(str(error).strip() or "no message").splitlines()[0]}. Check its name and the connection; a private one '
        'needs `hf auth login`.'
    )


def _from_folder(folder: str) -> Files:
    names = set(os.listdir(folder))
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
                f'Expected one checkpoint in {folder!r}, found {", ".join(files) or "none"}. '
                'Give the path of the file to load.'
            )
        found = files[0]
    path = os.path.join(folder, found)
    return Files(_shards(path) if found.endswith('.json') else (path,), _configs(folder))


def _shards(index: str) -> Tuple[str, ...]:
    """The files that an index names, all of them inside its folder."""
    folder = os.path.dirname(index) or '.'
    try:
        weight_map = json.loads(Path(index).read_text())['weight_map']
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"Expected an index with a 'weight_map' of tensors to files in {index!r}, got {e}.") from e
    if not names:
        raise ValueError(f'Expected an index that names files in {index!r}, it names none.')
    inside = [os.path.realpath(folder)]
    if Path(inside[0]).parent.name == 'snapshots':  # the Hub's cache links its snapshots to blobs beside them
        inside.append(os.path.join(Path(inside[0]).parents[1], 'blobs'))
    paths: List[str] = []
    for name in names:
        path = os.path.join(folder, name)
        real = os.path.realpath(path)
        if os.path.dirname(real) not in inside:
            raise ValueError(
                f'Expected shards inside {folder!r}, but its index leads to {name!r} outside of it. '
                'Copy the shards into the folder, if you trust them.'
            )
        if not os.path.isfile(path):
            raise ValueError(f'Expected all shards of {index!r}, {name!r} is missing. Get it too.')
        paths.append(path)
    return tuple(paths)


def _configs(folder: str) -> Dict[str, Any]:
    configs = {}
    for name in CONFIGS:
        path = Path(folder, name)
        if path.is_file():
            try:
                configs[name] = json.loads(path.read_text())
            except (ValueError, RecursionError) as e:
                raise ValueError(f'Expected JSON in {str(path)!r}, got {e}.') from e
    return configs


def _snapshot(hub_id: str) -> str:
    """Folder with one checkpoint of a Hub repository and its configs, taken from the cache where it is there."""
    repo_id, _, revision = hub_id.partition('@')
    try:
        names = huggingface_hub.list_repo_files(repo_id, revision=revision or None)
        weights = next((name for name in WEIGHTS if name in names), None)
        if weights is None:
            weights = next((name for name in names if '/' not in name and name.endswith(EXTENSIONS)), '')
        wanted = [*CONFIGS, weights]
        if weights.endswith('.json'):
            wanted.append(weights.replace('model', 'model-*').replace('.index.json', ''))
        return huggingface_hub.snapshot_download(repo_id, revision=revision or None, allow_patterns=wanted)
    except Exception as e:  # of the client and of the HTTP library below it, which changes with its version
        try:
            return huggingface_hub.snapshot_download(repo_id, revision=revision or None, local_files_only=True)
        except Exception:
            raise ValueError(explain_hub_error(hub_id, e)) from e
