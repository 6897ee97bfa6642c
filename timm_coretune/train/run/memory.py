"""The memory of a training step, before the first one

The network runs on fake tensors, which have shapes but no memory, so that it costs no arithmetic. What autograd keeps
of it for the backward pass is counted.
"""

import copy
import logging
import math
from typing import Any, Callable, ContextManager, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch._subclasses.fake_tensor import FakeTensorMode

from ..cli.settings import DataSettings

_logger = logging.getLogger(__name__)
_LARGE = 5_000_000  # parameters of a network whose memory is worth a line on a CPU too


class StepMemory(NamedTuple):
    """Bytes that a training step needs on a process, by what they hold.

    Attributes:
        parameters: Parameters and buffers of the model and the loss.
        average: The moving average of the weights, 0 without one.
        gradients: Gradients of what trains. DistributedDataParallel has them twice.
        optimizer: State of the optimizer, None if it cannot be found out.
        activations: What the network and the cross-entropy keep for the backward pass.
        num_images: Number of images of the step.
    """

    parameters: int
    average: int
    gradients: int
    optimizer: Optional[int]
    activations: int
    num_images: int

    def total(self) -> int:
        return self.parameters + self.average + self.gradients + (self.optimizer or 0) + self.activations


def _num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the memory behind tensors, which views share."""
    return sum({_id_of(x): x.untyped_storage().nbytes() for x in tensors}.values())


def _id_of(x: torch.Tensor) -> int:
    """What tells apart the memory of tensors, also of those that have none."""
    return x.untyped_storage()._cdata


def _optimizer_bytes(optimizer: torch.optim.Optimizer) -> Optional[int]:
    """Bytes of the state of an optimizer after its first step, which is made without memory. None if that fails."""
    state = optimizer.state
    if not state:
        parameters = [p for group in optimizer.param_groups for p in group['params']]
        hollow = [nn.Parameter(torch.empty_like(p, device='meta')) for p in parameters]
        for p in hollow:
            p.grad = torch.empty_like(p)
        try:
            trial = copy.deepcopy(optimizer, {id(p): h for p, h in zip(parameters, hollow, strict=True)})
            trial.step()
        except Exception:  # an optimizer may read values of gradients, which are not there
            return None
        state = trial.state
    return _num_bytes(x for values in state.values() for x in values.values() if isinstance(x, torch.Tensor))


def count_activations(
    model: nn.Module,
    shape: Sequence[int],
    autocast: Callable[[], ContextManager[Any]],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Bytes that a model in training mode and the cross-entropy of its output keep for the backward pass.

    Args:
        model: The model. It stays as it is.
        shape: Shape of a batch of images.
        autocast: Gives the context in which the forward pass runs.
        device: Device of the images.
        dtype: Dtype of the images.
    """
    mode = FakeTensorMode()
    memo: Dict[int, Any] = {id(x): mode.from_tensor(x) for x in (*model.parameters(), *model.buffers())}
    fake = copy.deepcopy(model, memo).train()
    own = {_id_of(x) for x in (*fake.parameters(), *fake.buffers())}
    kept: List[torch.Tensor] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        if _id_of(x) not in own:
            kept.append(x)
        return x

    with torch.random.fork_rng(devices=[]), mode, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        with autocast():
            output = fake(torch.empty(*shape, device=device, dtype=dtype))
        for logits in output if isinstance(output, (tuple, list)) else (output,):
            target = torch.zeros(logits.shape[0], *logits.shape[2:], dtype=torch.long, device=device)
            F.cross_entropy(logits.float(), target)
    return _num_bytes(kept)


def estimate(
    task: TrainingTask,
    optimizer: torch.optim.Optimizer,
    shape: Sequence[int],
    autocast: Callable[[], ContextManager[Any]],
    num_processes: int = 1,
    dtype: torch.dtype = torch.float32,
) -> StepMemory:
    """Estimate the memory of a step on batches of a shape."""
    module = cast(nn.Module, unwrap_model(task.get_trainable_module()))
    average = task.get_trainable_module(ema=True) if task.has_ema() else None
    held: Tuple[torch.Tensor, ...] = () if average is None else (*average.parameters(), *average.buffers())
    model = cast(nn.Module, task.get_eval_model())
    trained = [p for p in module.parameters() if p.requires_grad]
    return StepMemory(
        _num_bytes([*module.parameters(), *module.buffers()]),
        _num_bytes(x for x in held if x.device == trained[0].device),
        _num_bytes(trained) * (1 + (num_processes > 1)),
        _optimizer_bytes(optimizer),
        count_activations(model, shape, autocast, trained[0].device, dtype),
        shape[0],
    )


def batch_shape(settings: DataSettings, input_size: Sequence[int]) -> Tuple[int, ...]:
    """Shape of the largest batch that goes through the network at once."""
    channels, *size = input_size
    copies = max(settings.aug_splits, 1)
    sizes = [(side, side) for side in settings.train_img_sizes or ()] or [(size[0], size[1])]
    batches = zip(settings.batch_sizes, sizes, strict=True)
    return max(((copies * b, channels, *side) for b, side in batches), key=lambda shape: math.prod(shape))


def log_memory(
    task: TrainingTask,
    optimizer: torch.optim.Optimizer,
    shape: Sequence[int],
    autocast: Callable[[], ContextManager[Any]],
    num_processes: int = 1,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Log the estimated memory of a step in one line, unless a small network is trained on a CPU."""
    module = cast(nn.Module, unwrap_model(task.get_trainable_module()))
    parameters = list(module.parameters())
    if parameters[0].device.type == 'cpu' and sum(p.numel() for p in parameters) < _LARGE:
        return
    try:
        memory = estimate(task, optimizer, shape, autocast, num_processes, dtype)
    except Exception as e:  # some networks read values of images, which fake tensors do not have
        _logger.info(f'The memory of a step is not estimated: {type(e).__name__}.')
        return
    parts = {
        'parameters': memory.parameters,
        'their moving average': memory.average,
        'gradients': memory.gradients,
        'optimizer': memory.optimizer,
        f'activations of {memory.num_images} image(s)': memory.activations,
    }
    told = [f'{name} {n / 1e6:,.0f}' if n is not None else f'{name} unknown' for name, n in parts.items() if n != 0]
    _logger.info(
        f'Memory of a step, estimated for each process: {memory.total() / 1e6:,.0f} MB = {" + ".join(told)}. Contrast '
        'and the workspace of kernels come on top.'
    )
