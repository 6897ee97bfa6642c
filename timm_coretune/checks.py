"""Checks of arguments. Their errors say what was expected, what came, and the likely fix, and cut foreign names"""

from typing import Optional, Sequence

import torch
from torch._C import _functorch

MAX_NAME = 150  # characters of one name in a message; a foreign file may have keys of any length


def wrong_classes(target: torch.Tensor, num_classes: int, ignore_index: int) -> torch.Tensor:
    """List the values (N,) of a mask of any shape that are neither a class nor ignore_index."""
    return target[((target < 0) | (target >= num_classes)) & (target != ignore_index)]


def check_features(features: torch.Tensor, name: str = 'features', allow_empty: bool = False) -> None:
    """Reject features that are not a floating-point matrix with a row for each image.

    Args:
        features: Features to check.
        name: Name of the features in error messages.
        allow_empty: Accept a matrix without rows. One of several processes may have no image.

    Raises:
        ValueError: The shape or the dtype does not fit.
    """
    if features.ndim != 2 or not features.is_floating_point():
        raise ValueError(
            f'Expected {name} as a floating-point (batch_size, width) matrix, got {features.dtype} '
            f'{tuple(features.shape)}. Pool a feature map first, as timm does with '
            'model.forward_head(feature_map, pre_logits=True).'
        )
    if not allow_empty and features.shape[0] == 0:
        raise ValueError(f'Expected at least one row of {name}, got {tuple(features.shape)}. Drop empty batches.')


def check_target(target: torch.Tensor, batch_size: int, num_classes: Optional[int] = None) -> None:
    """Reject targets that are neither class indices nor soft targets of this batch.

    The range of class indices is checked on the CPU only. On an accelerator the check would wait for the device, and
    the kernels of the cross-entropy assert the range. In a compiled graph the check is an assertion that runs with it,
    and the labels of torch.vmap are checked all at once.

    Args:
        target: Targets to check.
        batch_size: Number of images in the batch.
        num_classes: Number of classes. When None any number is accepted.

    Raises:
        ValueError: Shape, dtype or range does not fit.
        RuntimeError: The range does not fit, found by a compiled graph.
    """
    if target.ndim not in (1, 2) or target.shape[0] != batch_size:
        raise ValueError(
            f'Expected class indices ({batch_size},) or soft targets ({batch_size}, num_classes) for features of batch '
            f'size {batch_size}, got {tuple(target.shape)}. Features, logits and target must come from the same batch.'
        )
    if target.ndim == 2:
        if not target.is_floating_point():
            raise ValueError(
                f'Expected soft targets of a floating-point dtype, got {target.dtype} {tuple(target.shape)}. '
                f'Class indices are passed as ({batch_size},), one-hot rows as float.'
            )
        if num_classes is not None and target.shape[1] != num_classes:
            raise ValueError(
                f'Expected soft targets ({batch_size}, {num_classes}) as the logits have {num_classes} classes, got '
                f'{tuple(target.shape)}. Create the model with num_classes={target.shape[1]}.'
            )
        return
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise ValueError(
            f'Expected class indices of an integer dtype, got {target.dtype}. Use target.long(), or pass soft targets '
            f'as ({batch_size}, num_classes).'
        )
    if target.device.type == 'cpu' and target.numel():
        expected = 'non-negative' if num_classes is None else f'in [0, {num_classes - 1}]'
        fix = 'Check num_classes of the model against the data set, and that labels start at 0.'
        if torch.compiler.is_compiling():  # asking for a value would break the graph
            lowest, highest = target.aminmax()
            fits = lowest >= 0 if num_classes is None else (lowest >= 0) & (highest < num_classes)
            torch._assert_async(fits, f'Expected class indices {expected}, got others. {fix}')
            return
        low, high = (int(bound) for bound in _without_vmap(target).aminmax())
        if low < 0 or (num_classes is not None and high >= num_classes):
            raise ValueError(f'Expected class indices {expected}, got {low} to {high}. {fix}')


def _without_vmap(x: torch.Tensor) -> torch.Tensor:
    """Tensor of all examples that torch.vmap maps over, which has values. Any other tensor is returned as it is."""
    while _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
    return x


def is_in_functorch(*tensors: torch.Tensor) -> bool:
    """Whether torch.func transforms one of these tensors, as torch.vmap does. A compiled graph does not know."""
    if torch.compiler.is_compiling():
        return False
    return any(_functorch.is_functorch_wrapped_tensor(x) for x in tensors)


def check_not_recomputed() -> None:
    """Refuse to draw random numbers in a backward pass, where torch.utils.checkpoint runs a forward pass again.

    It restores torch's global random state only. An explicit generator would give other numbers than in the forward
    pass, and the gradient would be that of another loss.

    Raises:
        RuntimeError: A backward pass is running.
    """
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            'Expected random numbers to be drawn once per step, got a second draw in the backward pass, where '
            'torch.utils.checkpoint recomputes. Leave the loss out of the checkpointed part, or call '
            'prepared = criterion.prepare(len(features), features.device) in front of it, and '
            'criterion.compute(features, logits, target, *prepared) inside.'
        )


def clip(text: str, count: int = MAX_NAME) -> str:
    """A text in one line, without control characters, and with its middle left out if it is long."""
    if len(text) > count:
        text = f'{text[: count // 2]} ... {text[-(count // 2) :]}'
    return ''.join(c if c.isprintable() else ' ' if c.isspace() else '?' for c in text)


def shorten(names: Sequence[str], count: int = 5) -> str:
    """The first names of a list, and the number of the others."""
    shown = ', '.join(clip(str(name)) for name in names[:count])
    return f'{shown} and {len(names) - count} more' if len(names) > count else shown
