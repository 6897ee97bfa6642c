"""What the network was pretrained on: normalization and size of pictures, size of patches, frames of a video"""

import os
import re
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
from timm.data.constants import IMAGENET_DEFAULT_MEAN
from timm.layers import to_2tuple

from ..model_config import PREPROCESSING, check_normalization
from ..run_folder import CONFIG_NAME
from .mapping import Mapping
from .reading.configs import FILE, FOLDER, reads_configs, section_of
from .rules import IMAGENET

Configs = Dict[str, Any]
_POSITIONS = (
    'pos_embed', 'pos_embedding', 'positional_embedding', 'position_embeddings', 'position_embedding',
    'position_embedding.weight',
)  # fmt: skip
# a convolution inside a numbered block embeds no patches
_PATCHES = re.compile(
    r'(^|\.)(patch_embed|patch_embed\.proj|patch_embed\.projection|patch_embeddings|patch_embeddings\.projection|'
    r'patch_embedding|conv_proj)\.weight$|^(?!.*\.\d+\.)(.*\.)?conv1\.weight$'
)


@reads_configs
def normalization(mapping: Mapping, config: Configs) -> Tuple[Tuple[float, ...], Tuple[float, ...]]:
    """Mean and std of the pretraining images.

    They are taken from the checkpoint or the configs beside it, else from the rule of the method. Both are empty if
    they are not known.

    Raises:
        ValueError: The checkpoint or a config names values that cannot be a mean and a std.
    """
    for section, names in (
        (('metadata',), ('mean', 'std')),  # of a safetensors file, numbers separated by spaces
        (('open_clip_config.json', 'preprocess_cfg'), ('mean', 'std')),
        (('preprocessor_config.json',), ('image_mean', 'image_std')),
        (('config.json', 'pretrained_cfg'), ('mean', 'std')),
    ):
        mean, std = (section_of(config, *section).get(name) for name in names)
        if mean is not None and std is not None:
            try:
                return check_normalization(mean, std)
            except ValueError as e:
                config_file = os.path.join(config.get(FOLDER, ''), section[0])
                file = config[FILE] if section[0] == 'metadata' else config_file
                raise ValueError(f'{e} in {file!r}. Correct it there.') from e
    if 'release' in config:
        return IMAGENET
    return mapping.rule.normalization or ((), ())


def data_config(mapping: Mapping, model: nn.Module, file_tensors: Dict[str, torch.Tensor], config: Configs) -> Configs:
    """Mean, std and input size of the pretraining images, as far as they are known, under timm's names."""
    found: Configs = {}
    mean, std = normalization(mapping, config)
    if mean and len(mean) == getattr(model, 'pretrained_cfg', {}).get('input_size', (3,))[0]:
        found.update(mean=mean, std=std)
    size = trained_size(model, file_tensors)
    if size:
        found['input_size'] = (3, size, size)
    return found


def trained_size(model: nn.Module, file_tensors: Dict[str, torch.Tensor]) -> int:
    """Side of the pretraining images in pixels, from the position embeddings and the patch projection in the file.

    Returns 0 if the file has none, or if the embeddings do not form a square.
    """
    patch_size = trained_patch_size(file_tensors) or built_patch_size(model)
    side = trained_grid(file_tensors)
    return side * patch_size[0] if patch_size and side else 0


def position_count(file_tensors: Dict[str, torch.Tensor]) -> int:
    """Number of position embeddings in the file, 0 if it has none."""
    found = (t.shape[-2] for key, t in file_tensors.items() if key.endswith(_POSITIONS) and t.ndim in (2, 3))
    return next(found, 0)


def _is_square(number: float) -> bool:
    return number >= 1 and round(number**0.5) ** 2 == number


def trained_grid(file_tensors: Dict[str, torch.Tensor]) -> int:
    """Number of patches along a side of the pretraining images, 0 if the file does not tell."""
    tokens = position_count(file_tensors)
    for extra in (1, 0, 2):  # tokens beside the patches: class token; none; class and distillation token
        side = round((tokens - extra) ** 0.5) if tokens > extra else 0
        if side and side * side == tokens - extra:
            return side
    return 0


def patch_projection(file_tensors: Dict[str, torch.Tensor]) -> Optional[torch.Tensor]:
    """Weight of the convolution that embeds the patches of a ViT, None if the file has none."""
    return next((t for key, t in file_tensors.items() if _PATCHES.search(key) and t.ndim in (4, 5)), None)


def trained_patch_size(file_tensors: Dict[str, torch.Tensor]) -> Optional[Tuple[int, int]]:
    """Height and width of a patch of the pretrained ViT, None if the file does not tell."""
    projection = patch_projection(file_tensors)
    return None if projection is None else (projection.shape[-2], projection.shape[-1])


def built_patch_size(model: nn.Module) -> Optional[Tuple[int, int]]:
    """Height and width of a patch of a model, None if it has no patches."""
    size = getattr(getattr(model, 'patch_embed', None), 'patch_size', None)
    return to_2tuple(size) if size else None


def _num_frames(config: Any) -> Optional[int]:
    """Number of frames that a config.json names at its top or in one of its sections, None if it names none."""
    sections = [config, *config.values()] if isinstance(config, dict) else []
    found = (section.get('num_frames') for section in sections if isinstance(section, dict))
    return next((n for n in found if isinstance(n, int)), None)


@reads_configs
def several_frames(model: nn.Module, file_tensors: Dict[str, torch.Tensor], config: Configs) -> List[str]:
    """Error for a ViT of video: a projection with a time axis, and not surely of one frame."""
    projection = patch_projection(file_tensors)
    grid = getattr(getattr(model, 'patch_embed', None), 'grid_size', None)
    if projection is None or projection.ndim != 5 or not grid:
        return []
    num_frames = _num_frames(config.get(CONFIG_NAME))
    tokens = position_count(file_tensors)
    is_one = tokens - grid[0] * grid[1] in (0, 1, 2) or not tokens  # beside the patches: class, distillation token
    if projection.shape[2] == 1 and (num_frames == 1 or (num_frames is None and is_one)):
        return []
    frames = f'{num_frames} frames' if num_frames else 'several frames, or of a larger picture'
    return [
        f'Expected a network of pictures, got one of video: its patch projection {tuple(projection.shape)} spans '
        f'{projection.shape[2]} frame(s), and its {tokens} position embeddings are of {frames}. Give their number: '
        '--checkpoint-frames N (frames=N) averages them to one picture, N=1 says that there is one.'
    ]


def average_frames(tree: Dict[str, Any], frames: int) -> Dict[str, Any]:
    """Make a ViT of video one of pictures, which sees a picture as a video that does not move.

    The projection is summed over its frames. Position embeddings are averaged over those of the video.

    Args:
        tree: Contents of the file, which stay as they are.
        frames: Number of frames of the video.

    Raises:
        ValueError: There is no projection with a time axis, or position embeddings are not of so many frames.
    """
    steps: List[int] = []

    def projected(tree: Dict[str, Any]) -> Dict[str, Any]:
        changed: Dict[str, Any] = {}
        for key, value in tree.items():
            if isinstance(value, dict):
                value = projected(value)
            elif isinstance(value, torch.Tensor) and value.ndim == 5 and _PATCHES.search(key):
                if frames % value.shape[2]:
                    raise ValueError(f'Expected frames as a multiple of the {value.shape[2]} of {key}, got {frames}.')
                steps.append(frames // value.shape[2])
                value = value.sum(2)
            changed[key] = value
        return changed

    def averaged(tree: Dict[str, Any], count: int) -> Dict[str, Any]:
        changed: Dict[str, Any] = {}
        for key, value in tree.items():
            if isinstance(value, dict):
                value = averaged(value, count)
            elif isinstance(value, torch.Tensor) and value.ndim in (2, 3) and key.endswith(_POSITIONS):
                tokens = value.shape[-2]
                extra = next((n for n in (1, 0, 2) if _is_square((tokens - n) / count)), None)
                if extra is None:
                    raise ValueError(
                        f'Expected position embeddings of {count} frames in {key}, it has {tokens} of them.'
                    )
                first, rest = value[..., :extra, :], value[..., extra:, :]
                rest = rest.unflatten(-2, (count, -1)).mean(-3)
                value = torch.cat([first, rest], -2)
            changed[key] = value
        return changed

    tree = projected(tree)
    if len(set(steps)) != 1:
        raise ValueError(
            f'Expected a network of video for frames={frames}, found no patch projection with a time axis.'
        )
    return averaged(tree, steps[0]) if steps[0] > 1 else tree


def resampled_patches(model: nn.Module, file_tensors: Dict[str, torch.Tensor]) -> List[str]:
    """Note about patches of another size than those of the model: the projection computes other values then."""
    built, trained = built_patch_size(model), trained_patch_size(file_tensors)
    if not built or trained is None or built == trained:
        return []
    note = (
        f'pretrained with patches of {trained[0]} px, the model has patches of {built[0]} px: the patch projection is '
        'resampled'
    )
    side, grid = trained_grid(file_tensors), getattr(model.patch_embed, 'grid_size', None)
    if side and grid and tuple(grid) != (side, side):
        note += f', and position embeddings are resized from {side} x {side} to {grid[0]} x {grid[1]}'
    return [f'{note}. --model-kwargs patch_size={trained[0]} avoids that']


def other_windows(model: nn.Module, file_tensors: Dict[str, torch.Tensor], config: Configs) -> List[str]:
    """Note about attention windows of a Swin V2 of another size than those of the model, as it computes other values.

    The size is told by a buffer in the file or by its config. No weight has another shape, unlike in a Swin.
    """
    tables = (t for key, t in file_tensors.items() if key.endswith('relative_coords_table') and t.ndim == 4)
    table = next(tables, None)
    trained = section_of(config, CONFIG_NAME).get('window_size') if table is None else (table.shape[1] + 1) // 2
    if not isinstance(trained, int):
        return []
    blocks: List[Any] = [module for module in model.modules() if hasattr(module, 'cpb_mlp')]
    built = max((block.window_size[0] for block in blocks), default=None)
    if built is None or trained == built:
        return []
    return [f'pretrained with attention windows of {trained} x {trained}, the model has {built} x {built}']


def write_data_config(
    model: nn.Module, found: Configs, described: bool = False, resized: Tuple[str, ...] = ()
) -> List[str]:
    """Write the data config of the pretraining to the model, where `timm.data.resolve_model_data_config` finds it.

    Args:
        model: Model whose `pretrained_cfg` is replaced.
        found: Result of `data_config`.
        described: Whether the values are those that a config.json of this very model says. They need no notes.
        resized: Names of the tensors that were resized.

    Returns:
        Notes for the user.
    """
    cfg = getattr(model, 'pretrained_cfg', None)
    if not isinstance(cfg, dict):
        return []
    notes = []
    keys = [key for key in PREPROCESSING if key != 'input_size'] if described else ['mean', 'std']
    known: Configs = {key: found[key] for key in keys if key in found}
    old = tuple(cfg.get('mean') or IMAGENET_DEFAULT_MEAN)
    if not described and known and tuple(known['mean']) != old:
        notes.append(f'images are to be normalized with mean {known["mean"]} and std {known["std"]}, not mean {old}')
    if not described and not known and old != IMAGENET_DEFAULT_MEAN:
        notes.append(f'the file does not tell how images were normalized: the mean {old} of the timm model is kept')
    if 'input_size' in found:
        size = tuple(found['input_size'])[1:]
        built = getattr(getattr(model, 'patch_embed', None), 'img_size', None)
        if built and tuple(built) != size:
            is_resized = any(name.endswith('pos_embed') for name in resized)
            notes.append(
                f'pretrained at {size[0]} px, the model is built for {built[0]} px'
                f'{": its position embeddings are resized" if is_resized else ""}'
            )
        else:
            known['input_size'] = ((cfg.get('input_size') or (3,))[0], *size)
    if described:  # what timm would use in place of these values for tests, and a fact about the old size
        cfg = {key: value for key, value in cfg.items() if key not in ('test_input_size', 'test_crop_pct')}
        if 'input_size' in known and tuple(known['input_size']) != tuple(cfg.get('input_size') or ()):
            cfg['pool_size'] = None
    model.pretrained_cfg = {**cfg, **known}  # type: ignore[assignment]  # nn.Module types attributes as tensors
    return notes
