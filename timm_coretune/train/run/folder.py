"""The run folder: created, locked by one run at a time, and searched for training states"""

import fnmatch
import glob
import logging
import os
import zipfile
from datetime import datetime
from typing import Any, Dict, List, Optional, Tuple

import torch
from filelock import FileLock, Timeout
from timm.models import safe_model_name

from ...atomic import is_temporary
from ...run_folder import (
    ARGS_NAME,
    BEST_WEIGHTS_NAME,
    CONFIG_NAME,
    PUBLISHED_NAMES,
    SEGMENTATION_CONFIG_NAME,
    STATE_PATTERNS,
    SUMMARY_NAME,
    UNFINISHED_STATE_NAMES,
)
from ..cli.settings import OutputSettings, SavedArguments

_logger = logging.getLogger(__name__)

LOCK_NAME = '.lock'
# earlier versions wrote NAME.tmp before NAME
_WRITTEN = (*PUBLISHED_NAMES, BEST_WEIGHTS_NAME, CONFIG_NAME, SEGMENTATION_CONFIG_NAME, *STATE_PATTERNS)
_UNFINISHED_PATTERNS = (*UNFINISHED_STATE_NAMES, *(f'{name}.tmp' for name in _WRITTEN))


def _lock(folder: str) -> Optional[FileLock]:
    """Lock the folder until the lock is released or this process ends. Returns None if another run holds it."""
    lock = FileLock(os.path.join(folder, LOCK_NAME), blocking=False)
    try:
        lock.acquire()
    except Timeout:
        return None
    return lock


def folder_of(settings: OutputSettings, name: str = '') -> str:
    """Path of the run folder that the settings ask for.

    Args:
        settings: Parent folder and name of the run.
        name: Name of the run if the settings have none.
    """
    return os.path.join(settings.root, settings.experiment or name)


def default_name(model: str, img_size: int) -> str:
    """Default name of a run, as in timm: time, model and image size."""
    return '-'.join([datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(model), str(img_size)])


def remove_unfinished(folder: str) -> List[str]:
    """Remove files that a run has not written to their end, and nothing else. Returns their names."""
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not entry.is_dir(follow_symlinks=False))
    patterns = _UNFINISHED_PATTERNS
    names = [name for name in names if is_temporary(name) or any(fnmatch.fnmatchcase(name, p) for p in patterns)]
    for name in names:
        os.unlink(os.path.join(folder, name))
    return names


def take_folder(settings: OutputSettings, name: str, resumed: Optional[str]) -> Tuple[str, FileLock]:
    """Create and lock the folder of a run, or lock that of the training state it continues.

    A folder that already holds another run is not touched. A number is appended to the name instead.

    Args:
        settings: Parent folder and name of the run.
        name: Name of the run if the settings have none.
        resumed: Path of the training state that is continued, None for a new run.

    Returns:
        The folder and its lock. Release the lock when the run is over.

    Raises:
        ValueError: The folder cannot be written, or another run is writing into it.
    """
    wanted = folder = folder_of(settings, name)
    continues = resumed is not None and os.path.abspath(os.path.dirname(resumed)) == os.path.abspath(folder)
    # --resume auto takes over a folder whose run was stopped before its first epoch ended
    marks = (SUMMARY_NAME,) if settings.resume == 'auto' else (ARGS_NAME, SUMMARY_NAME)
    number = 0
    try:
        while True:
            os.makedirs(folder, exist_ok=True)
            lock = _lock(folder)
            is_taken = any(os.path.exists(os.path.join(folder, mark)) for mark in marks)
            if lock is not None and (continues or not is_taken):
                break
            if lock is None and (continues or settings.resume == 'auto'):
                raise ValueError(f'Another run writes {folder!r} at this moment. Wait for it, or choose --experiment.')
            if lock is not None:
                lock.release()
            number += 1
            folder = f'{wanted}-{number}'
        unfinished = remove_unfinished(folder)
    except OSError as e:
        raise ValueError(f'Expected to write the run into {folder!r}: {e}. Choose another folder with --output.') from e
    if unfinished:
        _logger.info(f'Removed what a stopped run left half written: {", ".join(unfinished)}.')
    if number:
        _logger.warning(f'{wanted!r} holds a run already, this one goes to {folder!r} (--resume auto continues one).')
    return folder, lock


def read_state(path: str) -> Dict[str, Any]:
    """Read a training state. Only tensors, plain values and the namespace of arguments are unpickled.

    Raises:
        ValueError: The file is truncated, damaged or not a training state.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f'{damaged} in it is damaged')
        with torch.serialization.safe_globals([SavedArguments]):
            state = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        if 'state_dict' not in state or 'epoch' not in state:
            raise ValueError('it holds no state_dict and epoch')
    except Exception as e:  # whatever a damaged file makes the readers raise
        raise ValueError(f'Expected a state of train.py in {path!r}: {e}') from e
    return state


def progress_of(state: Dict[str, Any]) -> Tuple[int, int]:
    """Epoch and batch at which training continues from a state."""
    run = state.get('run_state')
    if run is None:  # written by timm's own script
        return state['epoch'] + (1 if state.get('version', 1) > 1 else 0), 0
    return run['epoch'], run['batch']


def state_paths(folder: str) -> List[str]:
    """Paths of the training states in a folder."""
    paths: List[str] = []
    for pattern in STATE_PATTERNS:
        paths += sorted(glob.glob(os.path.join(glob.escape(folder), pattern)))
    return paths


def find_newest_state(folder: str) -> Optional[str]:
    """Path of the intact state with the most training, None if there is none. Logs damaged files and skips them."""
    best: Optional[Tuple[Tuple[int, int], str]] = None
    for path in state_paths(folder):
        try:
            progress = progress_of(read_state(path))
        except ValueError as e:
            _logger.warning(f'Passing over a damaged state. {e}')
            continue
        if best is None or progress > best[0]:
            best = (progress, path)
    return best[1] if best else None
