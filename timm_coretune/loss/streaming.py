"""The contrastive loss of each anchor in memory that grows with the batch, and not with its square

The loss and its gradient are exact, see `streaming_blocks` for the formulas. Nothing of the size of the matrix of
similarities is kept for the backward pass: the logarithm of the sum of an anchor, and the mean slope of its positives,
are all it takes to compute a block of the matrix again.
"""

import functools
import importlib.util
import logging
from types import ModuleType
from typing import Any, List, Optional, Tuple

import torch

from ..mining import at_least_float32
from . import streaming_blocks
from .parts.dense_contrast import dense_contrast
from .parts.sorted_batch import SortedBatch

_logger = logging.getLogger(__name__)


@functools.cache  # once in a process for each kind of kernel
def _find_kernels(device: torch.device, dtype: torch.dtype, width: int, focal: bool) -> Optional[ModuleType]:
    """The module of the Triton kernels if they compile and run for such embeddings, else None, which is said once."""
    if importlib.util.find_spec('triton') is None:
        return None
    try:
        from . import streaming_triton

        unit = torch.eye(2, width, dtype=dtype, device=device)
        place, run = torch.arange(2, device=device), torch.tensor([[0, 2], [0, 2]], device=device)
        lse = streaming_triton.log_sum(unit, unit, place, place, place * 0, 1.0)
        streaming_triton.positive_sums(unit, unit, place, place, run, 1.0, lse, focal)
        for roles in ((True, True), (True, False), (False, True)):
            stats = [(lse, lse, lse) if role else None for role in roles]
            streaming_triton.gradient(unit, unit, place, place, place * 0, place * 0, 1.0, focal, *stats)
    except Exception as e:  # a compiler, a driver, a card with too little shared memory: whatever it is, blocks work
        _logger.warning(
            f'The Triton kernels of the contrastive loss do not work for embeddings {dtype} of width {width} on '
            f'{device}: {type(e).__name__}: {e}. The loss is computed by blocks in PyTorch instead, which is exact and '
            'slower.'
        )
        return None
    return streaming_triton


def backend(unit: torch.Tensor, focal: bool) -> ModuleType:
    """The module with the three functions that compute sums and gradients of such embeddings."""
    if unit.device.type != 'cuda':
        return streaming_blocks
    return _find_kernels(unit.device, unit.dtype, unit.shape[1], focal) or streaming_blocks


@functools.cache  # once in a process
def _warn_of_second_order() -> None:
    _logger.warning(
        'The gradient of the contrastive loss is to be differentiated itself (create_graph=True). That takes the whole '
        'matrix of similarities, whose memory grows with the square of the batch.'
    )


def _extra_logits(own: torch.Tensor, extra: torch.Tensor, exists: Optional[torch.Tensor], scale: float) -> torch.Tensor:
    """scale * cosine of each anchor and its extra embedding (B,), -inf where that does not exist."""
    logits = (at_least_float32(own) * extra).sum(dim=1) * scale
    return logits if exists is None else logits.masked_fill(~exists, float('-inf'))


def _phi(log_p: torch.Tensor, focal: bool) -> Tuple[torch.Tensor, torch.Tensor]:
    """Loss of a positive pair, and its slope."""
    if not focal:
        return -log_p, torch.full_like(log_p, -1.0)
    minus_q = log_p.expm1()
    phi = minus_q * log_p
    return phi, log_p + minus_q + phi


def _from_sorted(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """The rows of x in another order, in which row i is row at[i]."""
    return torch.empty_like(x).index_copy_(0, at, x)


@torch.library.custom_op('timm_coretune::contrast', mutates_args=())
def _contrast(
    unit: torch.Tensor,
    label: torch.Tensor,
    start: int,
    stop: int,
    unit_positive: Optional[torch.Tensor],
    unit_negative: Optional[torch.Tensor],
    has_negative: Optional[torch.Tensor],
    temperature: float,
    focal: bool,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss of each anchor, logarithm of the sum over its candidates, and mean slope of its positives, each (B,)."""
    scale, functions = 1.0 / temperature, backend(unit, focal)
    with torch.autocast(device_type=unit.device.type, enabled=False):
        own, takes_part = unit[start:stop], label[start:stop] >= 0
        batch = SortedBatch.create(unit, label, start, stop)
        places, at = batch[:4], batch.row_place - start
        lse = _from_sorted(functions.log_sum(*places, batch.column_label, scale), at)
        if unit_positive is not None:
            positive = _extra_logits(own, unit_positive, None, scale)
            lse = torch.logaddexp(lse, positive)
        if unit_negative is not None:
            lse = torch.logaddexp(lse, _extra_logits(own, unit_negative, has_negative, scale))
        lse = lse.masked_fill(~takes_part | (lse == float('-inf')), 0.0)
        sums = functions.positive_sums(*places, batch.row_run, scale, lse.index_select(0, at), focal)
        loss, slope = (_from_sorted(x, at) for x in sums)
        if unit_positive is not None:
            extra_loss, extra_slope = _phi(positive - lse, focal)
            loss, slope = loss + extra_loss, slope + extra_slope
        num_positives = _from_sorted(batch.num_positives(loss.dtype, unit_positive is not None), at)
        loss, slope = ((x / num_positives).masked_fill(~takes_part, 0.0) for x in (loss, slope))
        return loss, lse, slope


@_contrast.register_fake
def _(unit: torch.Tensor, label: torch.Tensor, start: int, stop: int, *_: Any) -> Tuple[torch.Tensor, ...]:
    dtype = torch.promote_types(unit.dtype, torch.float32)
    return tuple(unit.new_empty((stop - start,), dtype=dtype) for _ in range(3))


@torch.library.custom_op('timm_coretune::contrast_backward', mutates_args=())
def _contrast_backward(
    grad: torch.Tensor,
    lse: torch.Tensor,
    slope: torch.Tensor,
    unit: torch.Tensor,
    label: torch.Tensor,
    start: int,
    stop: int,
    unit_positive: Optional[torch.Tensor],
    unit_negative: Optional[torch.Tensor],
    has_negative: Optional[torch.Tensor],
    temperature: float,
    focal: bool,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for unit, unit_positive and unit_negative. For an extra that is None it has no elements."""
    scale, functions = 1.0 / temperature, backend(unit, focal)
    with torch.autocast(device_type=unit.device.type, enabled=False):
        batch = SortedBatch.create(unit, label, start, stop)
        at = batch.row_place - start
        grad = grad.to(lse.dtype).masked_fill(label[start:stop] < 0, 0.0) * scale
        num_positives = _from_sorted(batch.num_positives(lse.dtype, unit_positive is not None), at)
        of_positives, of_candidates = grad / num_positives, grad * slope
        stats = tuple(x.index_select(0, at) for x in (lse, of_positives, of_candidates))
        labels = (batch.row_label, batch.column_label)
        if batch.rows is batch.columns:
            result = functions.gradient(*batch[:4], *labels, scale, focal, stats, stats)
            grad_unit = _from_sorted(result, batch.column_place)
        else:
            as_columns = (batch.columns, batch.rows, batch.column_place, batch.row_place, *labels[::-1])
            result = functions.gradient(*as_columns, scale, focal, None, stats)
            grad_unit = _from_sorted(result, batch.column_place)
            result = functions.gradient(*batch[:4], *labels, scale, focal, stats, None)
            grad_unit.index_add_(0, batch.row_place, result)
        del batch, result
        own, own_grad = at_least_float32(unit[start:stop]), grad_unit[start:stop]
        grad_extras = [unit.new_empty(0), unit.new_empty(0)]
        for index, (extra, exists) in enumerate(((unit_positive, None), (unit_negative, has_negative))):
            if extra is None:
                continue
            log_p = _extra_logits(own, extra, exists, scale) - lse
            factor = -of_candidates * log_p.exp()
            if index == 0:
                factor = factor + of_positives * _phi(log_p, focal)[1]
            factor = factor.masked_fill(label[start:stop] < 0, 0.0)[:, None]
            own_grad.addcmul_(factor, at_least_float32(extra))
            grad_extras[index] = (factor * own).to(extra.dtype)
        return grad_unit.to(unit.dtype), grad_extras[0], grad_extras[1]


@_contrast_backward.register_fake
def _(
    grad: torch.Tensor,
    lse: torch.Tensor,
    slope: torch.Tensor,
    unit: torch.Tensor,
    label: torch.Tensor,
    start: int,
    stop: int,
    unit_positive: Optional[torch.Tensor],
    unit_negative: Optional[torch.Tensor],
    *_: Any,
) -> Tuple[torch.Tensor, ...]:
    extras = (unit_positive, unit_negative)
    return torch.empty_like(unit), *(unit.new_empty(0) if x is None else torch.empty_like(x) for x in extras)


def _save(ctx: Any, inputs: Tuple[Any, ...], output: Tuple[torch.Tensor, ...]) -> None:
    unit, label, ctx.start, ctx.stop, unit_positive, unit_negative, has_negative, ctx.temperature, ctx.focal = inputs
    _, lse, slope = output
    ctx.mark_non_differentiable(lse, slope)
    ctx.save_for_backward(unit, label, unit_positive, unit_negative, has_negative, lse, slope)


def _differentiate(ctx: Any, grad: torch.Tensor, *_: Any) -> Tuple[Optional[torch.Tensor], ...]:
    unit, label, unit_positive, unit_negative, has_negative, lse, slope = ctx.saved_tensors
    rest = (unit_positive, unit_negative, has_negative, ctx.temperature, ctx.focal)
    grads: List[Optional[torch.Tensor]] = [None] * len(ctx.needs_input_grad)
    if torch.is_grad_enabled():  # with create_graph=True
        _warn_of_second_order()
        loss = dense_contrast(unit, label, slice(ctx.start, ctx.stop), *rest)
        inputs = {0: unit, 4: unit_positive, 5: unit_negative}
        inputs = {index: x for index, x in inputs.items() if ctx.needs_input_grad[index]}
        found = torch.autograd.grad(loss, list(inputs.values()), grad, create_graph=True)
        for index, x in zip(inputs, found, strict=True):
            grads[index] = x
    else:
        found = _contrast_backward(grad, lse, slope, unit, label, ctx.start, ctx.stop, *rest)
        for index, x in zip((0, 4, 5), found, strict=True):
            grads[index] = x if ctx.needs_input_grad[index] else None
    return tuple(grads)


_contrast.register_autograd(_differentiate, setup_context=_save)


def streaming_contrast(
    unit: torch.Tensor,
    label: torch.Tensor,
    anchor: slice,
    unit_positive: Optional[torch.Tensor],
    unit_negative: Optional[torch.Tensor],
    has_negative: Optional[torch.Tensor],
    temperature: float,
    focal: bool,
) -> torch.Tensor:
    """The loss of each anchor in nats (B,), as `dense_contrast` gives it for class indices, in float32 or better.

    Embeddings may also be in half precision. Products are then summed in float32.
    """
    start, stop, _ = anchor.indices(unit.shape[0])
    return _contrast(unit, label, start, stop, unit_positive, unit_negative, has_negative, temperature, focal)[0]
