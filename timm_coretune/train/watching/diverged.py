"""Keeps a step whose losses are not finite: its batch, its seed, and the weights before it"""

import json
import os
import shutil
from typing import Any, Dict, List, NamedTuple, Sequence

import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import safe_open

from ...atomic import write_text
from ...data.seeding import make_key
from ...export import save_weights
from ...run_folder import DIVERGED_NAME, KEPT_STEP_NAME, KEPT_WEIGHTS_NAME, kept_share_name
from ...version import __version__
from ..data.batches import Input

_BUFFER, _INPUT, _TARGET = 'buffer.', 'input.', 'target'


class Place(NamedTuple):
    """The place of a step in a run: its epoch, its last batch in the epoch, and the number of its update."""

    epoch: int
    batch: int
    update: int


class StateBefore:
    """Copies of what the forward pass of a module changes: its buffers, and the generator of its loss.

    Args:
        module: The module that trains, without wrappers.
    """

    def __init__(self, module: nn.Module):
        self.buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        criterion: Any = getattr(module, 'criterion', None)
        self.extra = {}
        if hasattr(criterion, 'generator'):
            self.extra = {'criterion._extra_state': criterion.get_extra_state()}

    def state_of(self, module: nn.Module) -> Dict[str, torch.Tensor]:
        """The state_dict of the module with these copies in it. Updates of its parameters must not have been made."""
        state = module.state_dict()
        return {name: self.extra.get(name, self.buffers.get(name, value)) for name, value in state.items()}


def keep_step(
    folder: str,
    module: nn.Module,
    before: StateBefore,
    inputs: Sequence[Input],
    target: torch.Tensor,
    losses: Dict[str, float],
    place: Place,
    seed: int,
    accelerator: Accelerator,
    facts: Dict[str, Any],
) -> str:
    """Write a step into the folder `diverged` of a run. All processes must call this together.

    Args:
        folder: The run folder. Only the main process needs it.
        module: The module that trains, without wrappers, before its update.
        before: Its state before the forward pass.
        inputs: Images of this process, or patches, as they went into the model.
        target: Their targets.
        losses: The losses of this process by name.
        place: The place of the step in the run.
        seed: Seed of the run.
        accelerator: Processes and precision.
        facts: What else is needed to build the task again.

    Returns:
        The folder that was written.
    """
    target_folder = os.path.join(gather_object([folder])[0], DIVERGED_NAME)
    rank = accelerator.process_index
    if accelerator.is_main_process:
        shutil.rmtree(target_folder, ignore_errors=True)
        os.makedirs(target_folder)
        save_weights(before.state_of(module), os.path.join(target_folder, KEPT_WEIGHTS_NAME))
        step = dict(
            **place._asdict(),
            num_processes=accelerator.num_processes,
            device=accelerator.device.type,
            mixed_precision=str(accelerator.mixed_precision),
            num_threads=torch.get_num_threads(),
            versions={'torch': torch.__version__, 'timm_coretune': __version__},
            **facts,
        )
        write_text(json.dumps(step, indent=2) + '\n', os.path.join(target_folder, KEPT_STEP_NAME))
    accelerator.wait_for_everyone()
    tensors = {_TARGET: target, **{f'{_BUFFER}{name}': buffer for name, buffer in before.buffers.items()}}
    others: List[Dict[str, Any]] = []
    for index, input in enumerate(inputs):
        named = input if isinstance(input, dict) else {'': input}
        tensors.update({f'{_INPUT}{index}.{k}': v for k, v in named.items() if isinstance(v, torch.Tensor)})
        others.append({k: v for k, v in named.items() if not isinstance(v, torch.Tensor)})
    key = make_key(seed, rank, place.epoch, place.batch)
    notes = dict(losses=json.dumps(losses), key=str(key), others=json.dumps(others))
    save_weights(tensors, os.path.join(target_folder, kept_share_name(rank)), **notes)
    accelerator.wait_for_everyone()
    return target_folder


class Share(NamedTuple):
    """What a process kept of a step.

    Attributes:
        inputs: Its images, or patches, a batch each.
        target: Their targets.
        buffers: Buffers of its module before the step.
        losses: Its losses by name.
        key: Seed of torch's generators for the step.
    """

    inputs: List[Input]
    target: torch.Tensor
    buffers: Dict[str, torch.Tensor]
    losses: Dict[str, float]
    key: int


def read_share(path: str) -> Share:
    """Read what `keep_step` wrote of a process."""
    with safe_open(path, framework='pt') as f:
        notes = f.metadata()
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118, it is no dictionary
    inputs: List[Input] = []
    for index, other in enumerate(json.loads(notes['others'])):
        prefix = f'{_INPUT}{index}.'
        named = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        inputs.append(named.get('', {**other, **named}))
    buffers = {k.removeprefix(_BUFFER): v for k, v in tensors.items() if k.startswith(_BUFFER)}
    return Share(inputs, tensors[_TARGET], buffers, json.loads(notes['losses']), int(notes['key']))
