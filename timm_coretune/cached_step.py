"""A training step on more images than fit into memory, with the gradients of one batch of them

Paper: `Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup`
    - Luyu Gao, Yunyi Zhang, Jiawei Han, Jamie Callan, RepL4NLP 2021, https://arxiv.org/abs/2101.06983

Written from the paper, whose method is known as GradCache.
"""

import contextlib
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from timm.utils import unwrap_model
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import get_device_states, set_device_states

from .distributed import process_index_and_count
from .loss import TaskLoss
from .loss.parts.bank import Bank
from .mixup import protect_draws
from .task import CoreTuningModule, CoreTuningTask, FeaturesAndLogits

Input = Union[torch.Tensor, Dict[str, Any]]
_REASONS = {
    'model': 'it penalises weights, whatever the batch',
    'input': 'it runs a second network on all images at once, whose memory grows with the batch',
    'maps': 'it compares feature maps, which are not kept for the whole batch',
}
_TOLERANCE = 0.01  # greatest difference between both passes, as a share of the greatest feature


class CachedStep:
    """Forward and backward pass of a batch in chunks, with pairs mined and contrasted over all of its images.

    A first pass computes the features and logits of each chunk without a graph. The loss of the whole batch gives their
    gradients. A second pass computes each chunk again, with a graph, and continues these gradients. Memory is that of a
    step of one chunk, and the images, features and logits of the batch. It costs one forward pass more.

    The gradients are those of one graph over the same chunks. Without BatchNorm that is the gradient of the whole
    batch. BatchNorm normalises each chunk by itself, as it does in accumulation. Dropout and drop path drop the same in
    both passes. Buffers, such as the statistics of BatchNorm, change once. Other state that a model keeps between
    forward passes is not known here, nor are draws from generators of Python and NumPy. The first step raises an error
    if features differ between both passes by more than 1 %; smaller differences are not noticed.

    Autocast around a step holds for all passes. A step may be one of several that accumulate gradients, inside
    `task.no_sync()` unless it is the last. In several processes the module of the task may be in
    DistributedDataParallel. They communicate in the loss and in the last chunk. FSDP and DeepSpeed are not supported.

    Args:
        task: The task. It may be compiled and wrapped afterwards.
        chunk_size: Greatest number of images in a forward pass. When None, batches must be given as lists.
        prepare: Called with each chunk before each of its two forward passes, returns what goes into the model. Both
            calls must return the same; draws from torch's generators are repeated. So images can wait as bytes, or in
            the memory of the host. When None, chunks go in as they are.

    Raises:
        TypeError: The task is not a CoreTuningTask for images.
        ValueError: The loss does not follow from features and logits alone, or chunk_size is less than 1.

    Examples:

        ```python
        step = CachedStep(task, chunk_size=64)
        result = step(images, target)  # 1024 images; the backward pass has run
        optimizer.step()
        ```
    """

    def __init__(
        self,
        task: CoreTuningTask,
        chunk_size: Optional[int] = None,
        prepare: Optional[Callable[[Input], Input]] = None,
    ):
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f'Expected chunk_size >= 1, the images of a forward pass, got {chunk_size}.')
        module = unwrap_model(getattr(task, 'trainable_module', None))
        if not isinstance(module, CoreTuningModule) or type(module).forward is not CoreTuningModule.forward:
            raise TypeError(
                f'Expected a CoreTuningTask, whose loss follows from the features and logits of images, got a '
                f'{type(task).__name__}. Accumulate gradients instead.'
            )
        _check_loss(module.criterion)
        if any(isinstance(part, Bank) for part in module.model.modules()):
            raise ValueError('Expected a model without a Bank, to which each of the two forward passes would add.')
        self.task = task
        self.chunk_size = chunk_size
        self.prepare = prepare or _as_given
        self._has_compared = False

    def __call__(
        self,
        input: Union[Input, Sequence[Input]],
        target: Union[torch.Tensor, Sequence[torch.Tensor]],
        backward: Optional[Callable[[torch.Tensor], Any]] = None,
    ) -> Dict[str, torch.Tensor]:
        """Run the forward and backward pass of a batch. Gradients are added to those that are there.

        Args:
            input: Images (N, 3, H, W), or a dictionary as for `CoreTuningTask.forward`. Or a list of these, which are
                the chunks if they are not larger than chunk_size.
            target: Targets as for `CoreTuningTask.forward`, in one tensor or a list.
            backward: Called with the loss in place of `loss.backward()`. It may scale the loss, as
                `accelerator.backward` or `lambda loss: scaler.scale(loss).backward()` do.

        Returns:
            What the task returns, without a graph: 'loss', its parts, and 'output', the logits (N, C).

        Raises:
            ValueError: target does not fit the batch, or the module of the task is in a wrapper that is not supported.
            RuntimeError: The task is not in training mode, or the second pass differs from the first.
        """
        wrapped = self.task.trainable_module
        module: CoreTuningModule = unwrap_model(wrapped)
        # what lies in DistributedDataParallel, which would wait for gradients of all parameters after a forward pass
        bare = wrapped.module if isinstance(wrapped, DistributedDataParallel) else wrapped
        _check_module(module, bare)
        chunks = self._split(input)
        sizes = [_count_images(chunk) for chunk in chunks]
        target = target if isinstance(target, torch.Tensor) else torch.cat(list(target))
        module.criterion.check_target(target, sum(sizes), module.model.num_classes)
        module.criterion.check_updates(module.model)
        prepared = protect_draws(module.criterion.prepare(sum(sizes), target.device))
        with module.listening():
            whole, starts = self._first_pass(module, chunks, is_compiled=hasattr(bare, '_orig_mod'))
            losses, gradients = _compute_losses(module, bare, whole, target, prepared, backward)
            end = _State(module.model)
            parts = [_split_with_gradient(x, sizes) for x in (whole.features, whole.logits)]
            for index, (chunk, start) in enumerate(zip(chunks, starts, strict=True)):
                is_last = index + 1 == len(chunks)
                with contextlib.nullcontext() if is_last else self.task.no_sync():
                    start.restore(module.model)
                    again: FeaturesAndLogits = wrapped(self.prepare(chunk))
                    self._compare(parts[0][index][0], again.features)
                    outputs = [(again.features, parts[0][index][1]), (again.logits, parts[1][index][1])]
                    if is_last:  # whose backward pass is the one in which processes communicate
                        outputs += zip(again.loss_parameters, gradients, strict=True)
                    _backward(outputs)
                del again, outputs
            end.restore(module.model)
        return {**losses, 'output': whole.logits.detach()}

    def _split(self, input: Union[Input, Sequence[Input]]) -> List[Input]:
        batches = [input] if isinstance(input, (torch.Tensor, dict)) else list(input)
        if self.chunk_size is None:
            if isinstance(input, (torch.Tensor, dict)):
                raise ValueError(
                    'Expected a list of chunks, since chunk_size is None, got one batch. Set chunk_size, the images of '
                    'a forward pass.'
                )
            return batches
        return [chunk for batch in batches for chunk in _split_batch(batch, self.chunk_size)]

    def _first_pass(
        self, module: CoreTuningModule, chunks: Sequence[Input], is_compiled: bool
    ) -> Tuple[FeaturesAndLogits, List['_State']]:
        """Features and logits of all chunks as leaves, and the states of the model before each chunk."""
        starts, outputs = [], []
        # compiled code draws other random numbers for dropout if it needs no graph
        with self.task.no_sync(), torch.set_grad_enabled(is_compiled):
            for chunk in chunks:
                starts.append(_State(module.model))
                outputs.append([x.detach() for x in self.task.trainable_module(self.prepare(chunk))[:2]])
        features, logits = (torch.cat(parts).requires_grad_() for parts in zip(*outputs, strict=True))
        return FeaturesAndLogits(features, logits), starts

    @torch.no_grad()
    def _compare(self, first: torch.Tensor, second: torch.Tensor) -> None:
        """Raise a RuntimeError if both passes differ. It waits for the device, so it is done in the first step only."""
        if self._has_compared or not len(first):
            return
        self._has_compared = True
        scale = float(first.abs().max())
        difference = float((first - second).abs().max()) / max(scale, torch.finfo(first.dtype).tiny)
        if difference > _TOLERANCE:
            raise RuntimeError(
                f'Expected the same features in both forward passes of a chunk, got a difference of '
                f'{100 * difference:.2g} %. The model keeps state between forward passes that is not in a buffer, or '
                "draws random numbers from Python or NumPy: draw them from torch's generators, or use a plain step. Or "
                'prepare gives other images each time.'
            )


class _State:
    """State of the random generators and of the buffers of a model before a forward pass."""

    def __init__(self, model: nn.Module):
        of_devices = {p.device: p for p in model.parameters() if p.device.type not in ('cpu', 'meta')}
        self.device_type = next(iter(of_devices)).type if of_devices else None
        self.cpu_state = torch.get_rng_state()
        self.device_states = get_device_states(*of_devices.values()) if of_devices else None
        self.buffers = [buffer.clone() for buffer in model.buffers()]

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        torch.set_rng_state(self.cpu_state)
        if self.device_states is not None:
            set_device_states(*self.device_states, device_type=self.device_type)
        for buffer, before in zip(model.buffers(), self.buffers, strict=True):
            buffer.copy_(before)


def _check_loss(criterion: TaskLoss) -> None:
    for name in criterion.requires:
        if name in _REASONS:
            raise ValueError(
                f'Expected a loss that follows from features and logits, got {type(criterion).__name__}: '
                f'{_REASONS[name]}. Accumulate gradients instead.'
            )


def _check_module(module: CoreTuningModule, bare: nn.Module) -> None:
    if not module.training:
        raise RuntimeError('Expected a task in training mode, got one in evaluation mode. Call task.train().')
    is_known = getattr(bare, '_orig_mod', bare) is module or process_index_and_count()[1] == 1
    if not is_known or any(hasattr(p, 'device_mesh') for p in module.parameters()):
        name = type(bare).__name__ if not is_known else 'one whose parameters FSDP shards'
        raise ValueError(
            f'Expected a module in DistributedDataParallel, or in no wrapper, got {name}. Use '
            'task.prepare_distributed().'
        )


def _as_given(chunk: Input) -> Input:
    return chunk


def _count_images(batch: Input) -> int:
    return len(batch if isinstance(batch, torch.Tensor) else next(iter(batch.values())))


def _split_batch(batch: Input, size: int) -> List[Input]:
    """Chunks of a batch, in order. What is not a tensor is the same in all of them."""
    if isinstance(batch, torch.Tensor):
        return list(batch.split(size))
    parts = {name: value.split(size) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    return [{**batch, **dict(zip(parts, chunk, strict=True))} for chunk in zip(*parts.values(), strict=True)]


def _split_with_gradient(x: torch.Tensor, sizes: List[int]) -> List[Tuple[torch.Tensor, Optional[torch.Tensor]]]:
    gradients = [None] * len(sizes) if x.grad is None else x.grad.split(sizes)
    return list(zip(x.detach().split(sizes), gradients, strict=True))


def _compute_losses(
    module: CoreTuningModule,
    bare: nn.Module,
    whole: FeaturesAndLogits,
    target: torch.Tensor,
    prepared: Sequence[Any],
    backward: Optional[Callable[[torch.Tensor], Any]],
) -> Tuple[Dict[str, torch.Tensor], List[Optional[torch.Tensor]]]:
    """Compute the losses and their gradients: those of features and logits, in place, and those of loss parameters."""
    # older versions of torch cast weights in the first pass, and use them again without a gradient
    torch.clear_autocast_cache()
    # leaves with the same values: gradients of the parameters themselves must arise where processes reduce them
    parameters = module.loss_parameters()
    leaves = [p.detach().requires_grad_() for p in parameters]
    names = {id(p): name for name, p in bare.named_parameters()}
    named = {names[id(p)]: leaf for p, leaf in zip(parameters, leaves, strict=True)}
    losses = functional_call(bare, named, (whole, target, *prepared))
    (backward or torch.Tensor.backward)(losses['loss'])
    del losses['output']
    return {name: loss.detach() for name, loss in losses.items()}, [leaf.grad for leaf in leaves]


def _backward(outputs: Sequence[Tuple[torch.Tensor, Optional[torch.Tensor]]]) -> None:
    known = [(output, gradient) for output, gradient in outputs if output.requires_grad and gradient is not None]
    if known:
        torch.autograd.backward([output for output, _ in known], [gradient for _, gradient in known])
