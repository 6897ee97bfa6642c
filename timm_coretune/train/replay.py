"""Repeats a step whose losses were not finite, and says where that begins

timm-coretune replay RUN
"""

import argparse
import dataclasses
import functools
import json
import logging
import math
import os
import sys
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
from safetensors.torch import load_file
from timm.task import TrainingTask
from timm.utils import setup_default_logging, unwrap_model

from ..cached_step import CachedStep
from ..data.seeding import kept_generators, seed_torch
from ..redaction import redacted_output
from ..run_folder import (
    DIVERGED_NAME,
    KEPT_STEP_NAME,
    KEPT_WEIGHTS_NAME,
    kept_share_name,
    read_args,
    read_json,
)
from ..task import CoreTuningTask
from .cli.criterion import needs_stats
from .cli.errors import sentence_of
from .cli.settings import Settings
from .data.batches import input_to_device
from .data.datasets import Datasets
from .freezing import BackboneFreezer
from .model import place_model
from .processes import create_accelerator
from .session import kind_of
from .watching.diverged import Share, read_share

_logger = logging.getLogger(__name__)


class NonFinite:
    """Finds the first module whose output is not finite, in the order in which the modules end.

    Args:
        module: Module to look into.
    """

    def __init__(self, module: nn.Module):
        self.first: Optional[str] = None
        self.handles = [
            part.register_forward_hook(self._look(name or type(part).__name__)) for name, part in module.named_modules()
        ]

    def _look(self, name: str) -> Any:
        def hook(module: nn.Module, args: Tuple[Any, ...], output: Any) -> None:
            if self.first is None and not _is_finite(output):
                came = 'with finite inputs' if _is_finite(args) else 'with inputs that are not finite'
                bad = [key for key, p in module.named_parameters(recurse=False) if not p.isfinite().all()]
                weights = f'its {" and ".join(bad)} not finite' if bad else 'its own weights finite'
                self.first = f'{name} ({type(module).__name__}), {came}, {weights}'

        return hook

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def _is_finite(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, (tuple, list)):
        return all(map(_is_finite, value))
    return all(map(_is_finite, value.values())) if isinstance(value, dict) else True


def _load(folder: str) -> Tuple[Settings, Dict[str, Any], Dict[str, torch.Tensor]]:
    kept = os.path.join(folder, DIVERGED_NAME)
    if not os.path.isfile(os.path.join(kept, KEPT_STEP_NAME)):
        raise ValueError(
            f'Expected a step that diverged in {kept!r}, found none. One process on a CPU keeps it by itself, others '
            'do with --catch-diverged.'
        )
    step = read_json(os.path.join(kept, KEPT_STEP_NAME), 'the description of a step')
    settings = Settings.from_flat(read_args(folder))
    # the weights are those of the step, so no checkpoint is read
    model = dataclasses.replace(settings.model, pretrained=False, pretrained_path=None, initial_checkpoint='')
    output = dataclasses.replace(settings.output, log_with='', log_wandb=False)
    settings = dataclasses.replace(settings, model=model, output=output)
    return settings, step, load_file(os.path.join(kept, KEPT_WEIGHTS_NAME))


def _build(settings: Settings, step: Dict[str, Any], weights: Dict[str, torch.Tensor], accelerator: Any) -> Any:
    """The task of the run as it was before the step, and what freezes its backbone, if anything does."""
    kind = kind_of(settings)
    datasets = kind.open_datasets(settings) if needs_stats(settings.loss) else Datasets(None, None, None, None)
    plain, _ = kind.create_model(settings, step['num_classes'], False)
    model = place_model(settings.model, plain, accelerator, settings.data.aug_splits)
    task: TrainingTask = kind.create_task(settings, model, datasets, accelerator.device, False)
    if isinstance(task, CoreTuningTask):
        task.start(step['num_updates'])
    unwrap_model(task.get_trainable_module()).load_state_dict(weights)
    freezer = None
    if settings.optimization.freeze_epochs:
        freezer = BackboneFreezer(task, settings.optimization.freeze_epochs)
        freezer.start_epoch(step['epoch'])
    return task, freezer


def _run(
    settings: Settings, task: TrainingTask, freezer: Optional[BackboneFreezer], share: Share, accelerator: Any
) -> Tuple[Dict[str, float], Optional[str]]:
    """Losses of the step by name, and the first module whose output is not finite. Leaves gradients behind."""
    device, module = accelerator.device, unwrap_model(task.get_trainable_module())
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            buffer.copy_(share.buffers[name])
    task.trainable_module = accelerator.prepare(task.trainable_module)
    task.get_trainable_module().train()  # type: ignore[union-attr]  # every task that trains has one
    if freezer is not None:
        freezer.after_train_mode()
    finder = NonFinite(module)
    dtype = getattr(torch, settings.model.model_dtype) if settings.model.model_dtype else None
    prepare = functools.partial(input_to_device, device=device, channels_last=settings.model.channels_last, dtype=dtype)
    target = share.target.to(device)
    seed_torch(share.key, device)
    if len(share.inputs) > 1:
        assert isinstance(task, CoreTuningTask)
        result = CachedStep(task, prepare=prepare)(share.inputs, target, accelerator.backward)
    else:
        result = task(prepare(share.inputs[0]), target)
        accelerator.backward(result['loss'])
    finder.remove()
    losses = {k.removesuffix('_loss'): float(v.detach()) for k, v in result.items() if k.endswith('loss')}
    return losses, finder.first


def _describe_gradients(module: nn.Module) -> List[str]:
    """Norms of the gradients of the parts of a module, in its order."""
    norms: Dict[str, List[torch.Tensor]] = {}
    for name, p in module.named_parameters():
        if p.grad is not None:
            parts = name.split('.')
            part = '.'.join(parts[: min(2 if parts[0] in ('model', 'criterion') else 1, len(parts) - 1)] or parts)
            norms.setdefault(part, []).append(p.grad.detach().float().norm().cpu())
    return [f'  {part}: {torch.stack(found).norm():.4g}' for part, found in norms.items()]


def _same(first: float, second: float) -> bool:
    return first == second or (math.isnan(first) and math.isnan(second))


def replay(folder: str, process: int = 0) -> bool:
    """Repeat the step that a run kept, and print what it finds.

    Args:
        folder: The run folder.
        process: Process of the run whose batch is taken, where there were several.

    Returns:
        Whether all losses are those of the run, to the bit.

    Raises:
        ValueError: The folder has no such step, or the process had none.
    """
    settings, step, weights = _load(folder)
    num_processes = step['num_processes']
    torch.set_num_threads(step['num_threads'])  # sums depend on it
    accelerator = create_accelerator(settings.loop, settings.output)
    if accelerator.num_processes > 1:
        if accelerator.num_processes != num_processes:
            raise ValueError(
                f'Expected one process or {num_processes}, as in the run, got {accelerator.num_processes}.'
            )
        process = accelerator.process_index
    path = os.path.join(folder, DIVERGED_NAME, kept_share_name(process))
    if not os.path.isfile(path):
        raise ValueError(f'Expected the batch of process {process} of {num_processes} in {path!r}, found none.')
    share = read_share(path)
    with kept_generators(accelerator.device):
        task, freezer = _build(settings, step, weights, accelerator)
        losses, first = _run(settings, task, freezer, share, accelerator)
    lines = [f'Update {step["update"]}, epoch {step["epoch"]}, batch {step["batch"]}, process {process}:']
    lines += [
        f'  {name}: {losses.get(name)}' + ('' if _same(losses.get(name, 0.0), value) else f', in the run {value}')
        for name, value in share.losses.items()
    ]
    module = unwrap_model(task.get_trainable_module())
    bad = [name for name, p in module.named_parameters() if not p.isfinite().all()]
    lines.append(f'Weights before the step: {f"not finite in {len(bad)} tensors, " + bad[0] if bad else "finite"}.')
    lines.append(f'First module whose output is not finite: {first or "none; the loss itself overflows"}.')
    lines += ['Norms of the gradients:', *_describe_gradients(module)]
    is_same = losses.keys() == share.losses.keys() and all(_same(losses[k], v) for k, v in share.losses.items())
    if is_same:
        lines.append('The losses are those of the run.')
    else:
        lines.append('The losses are NOT those of the run. What may differ:')
        if accelerator.num_processes != num_processes:
            lines.append(
                f'  the run had {num_processes} processes and compared images of all of them, this is the batch of '
                f'one. accelerate launch --num_processes {num_processes} -m timm_coretune replay repeats all.'
            )
        if step['compiled']:
            lines.append('  the run was compiled, this is not.')
        if step['device'] != accelerator.device.type:
            lines.append(f'  the run was on {step["device"]}, this is on {accelerator.device.type}.')
        lines.append(f'  versions: in the run {json.dumps(step["versions"])}, torch here {torch.__version__}.')
    print('\n'.join(lines), flush=True)
    return is_same


@redacted_output()
def main(arguments: Optional[List[str]] = None) -> None:
    """Run the command. The exit code is 0 if the losses of the run come again, 1 if others, 2 if it cannot be done."""
    parser = argparse.ArgumentParser('timm-coretune replay', description='Repeat the step in which a run diverged.')
    parser.add_argument('run', metavar='RUN', help='output folder of train.py')
    parser.add_argument('--process', type=int, default=0, metavar='N', help='whose batch (default: %(default)s)')
    args = parser.parse_args(arguments)
    setup_default_logging(default_level=logging.WARNING)
    try:
        is_same = replay(args.run, args.process)
    except Exception as e:
        sentence = sentence_of(e)
        if sentence is None:
            raise
        print(f'timm-coretune replay: error: {sentence}', file=sys.stderr)
        sys.exit(2)
    sys.exit(0 if is_same else 1)


if __name__ == '__main__':
    main()
