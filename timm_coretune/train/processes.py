"""Sets up accelerate: device, processes, precision and trackers"""

import dataclasses
import logging
import os
from typing import Any, Dict, Mapping

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType
from timm.optim import get_optimizer_info, list_optimizers

from ..loss import METHODS
from ..redaction import redact, redact_values, redacted_command_line
from .cli.conflicts import split_names
from .cli.settings import LoopSettings, OutputSettings, Settings

_logger = logging.getLogger(__name__)


def create_accelerator(loop: LoopSettings, output: OutputSettings, device_given: bool = False) -> Accelerator:
    """Create the Accelerator. What was given to accelerate launch wins over --amp.

    Args:
        loop: Device and precision.
        output: Trackers and their folder.
        device_given: Whether --device was given. The default device is not enforced.

    Raises:
        ValueError: A tracker is not installed, or accelerate finds another device than the one asked for.
    """
    mixed_precision = None
    launched = os.environ.get('ACCELERATE_MIXED_PRECISION', 'no')
    if loop.amp and launched == 'no':
        mixed_precision = {'float16': 'fp16', 'bfloat16': 'bf16'}[loop.amp_dtype]
    elif loop.amp:
        _logger.warning(f'accelerate launch was given --mixed_precision {launched}, which wins over --amp.')
    if 'MASTER_PORT' in os.environ and 'RANK' not in os.environ and 'ACCELERATE_MIXED_PRECISION' in os.environ:
        _logger.warning(
            'accelerate launch --cpu starts one process, whatever --num_processes says. For several use '
            'accelerate launch --multi_gpu --num_processes N train.py --device cpu, or a file of configs/.'
        )
    trackers = split_names(output.log_with)
    if output.log_wandb and 'wandb' not in trackers:
        trackers.append('wandb')
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        cpu=loop.device == 'cpu' or not torch.accelerator.is_available(),
        log_with=trackers or None,
        project_dir=output.root,  # until the run folder is known
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=not loop.no_ddp_bb)],
    )
    check_accumulation(accelerator)
    missing = sorted(set(trackers) - {'all'} - {str(getattr(name, 'value', name)) for name in accelerator.log_with})
    if missing:  # accelerate silently leaves out trackers that are not installed
        raise ValueError(f'--log-with {", ".join(missing)}: not installed. Install the package of that name.')
    if device_given and accelerator.device.type != loop.device:
        raise ValueError(
            f'Expected --device {loop.device}, accelerate found {accelerator.device.type}. Check the installation of '
            'torch, and what accelerate launch was given.'
        )
    return accelerator


def check_accumulation(accelerator: Accelerator) -> None:
    """Raise a ValueError if accelerate or DeepSpeed would divide the loss for an accumulation of their own."""
    asked = {'accelerate': accelerator.gradient_accumulation_steps}
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        asked['the configuration of DeepSpeed'] = plugin.deepspeed_config.get('gradient_accumulation_steps', 1)
    for name, steps in asked.items():
        if steps in (1, 'auto'):
            continue
        instead = f'use --grad-accum-steps {steps} (in Python LoopConfig(grad_accum_steps={steps}))'
        raise ValueError(
            f'Expected no accumulation of gradients but that of --grad-accum-steps, got gradient_accumulation_steps '
            f'{steps} in {name}, by which the gradients would be divided once more. Set it to 1 there and '
            f'{instead if plugin is None else "raise the batch size"}.'
        )


def precision_of(accelerator: Accelerator) -> str:
    """The mixed precision that a run really has. On a CPU accelerate ignores float16."""
    asked = str(accelerator.mixed_precision)
    if asked == 'fp16' and accelerator.device.type == 'cpu':
        return 'no, since float16 needs a GPU: float32 throughout (--amp-dtype bfloat16 works on a CPU)'
    return asked


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether weights or optimizer state are split over the processes, by FSDP or DeepSpeed."""
    return accelerator.is_fsdp2 or accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def check_second_order(name: str, accelerator: Accelerator) -> None:
    """Refuse an optimizer that differentiates the gradients, in several processes.

    Raises:
        ValueError: There are several processes.
    """
    if accelerator.num_processes > 1:
        raise ValueError(
            f'{name} needs the second derivative of the loss. DistributedDataParallel keeps no graph of the gradients '
            f'that it averages over {accelerator.num_processes} processes. Train in one, or use another optimizer.'
        )


def share_batch(settings: Settings, num_processes: int) -> Settings:
    """Settings with the batch size of a process, from --global-batch-size.

    Raises:
        ValueError: The processes cannot have equal shares, or shares are too small.
    """
    data, total = settings.data, settings.data.global_batch_size
    if total is None:
        return settings
    size, rest = divmod(total, num_processes)
    if rest or not size:
        lower = max(size, 1) * num_processes
        raise ValueError(
            f'--global-batch-size: expected a multiple of the {num_processes} processes, got {total}. Choose {lower} '
            f'or {lower + num_processes}.'
        )
    least, step, flag = (4, 1, '--class-balance') if data.class_balance else (1, 1, '')
    if data.mixes_pixels and not settings.loop.eval_only:
        least, step, flag = max(least, 2), 2, f'{flag} --mixup or --cutmix'.strip()
    if size < least or size % step:
        raise ValueError(
            f'--global-batch-size: {total} in {num_processes} process(es) is {size} each; {flag} needs '
            f'{"an even number" if step == 2 else "a number"} of {least} or more.'
        )
    return dataclasses.replace(settings, data=dataclasses.replace(data, batch_size=size))


def check_strategy(settings: Settings, accelerator: Accelerator) -> None:
    """Check that several processes, and FSDP or DeepSpeed if used, support all settings.

    Raises:
        ValueError: A setting is not supported.
    """
    opt = settings.optimization.opt.lower().split('_')[-1]  # without a prefix such as lookahead_
    if not settings.loop.eval_only and opt in list_optimizers() and get_optimizer_info(opt).second_order:
        check_second_order(f'--opt {opt}', accelerator)
    if os.environ.get('ACCELERATE_USE_FSDP') == 'true' and not is_sharded(accelerator):
        _logger.warning('accelerate does not shard by FSDP on this device: training by DistributedDataParallel.')
    if not is_sharded(accelerator):
        return
    name, method = accelerator.distributed_type.value, settings.loss.task_loss
    for flag, given in (
        ('--resume', settings.output.resume),
        ('--recovery-interval', settings.output.recovery_interval),
        ('--save-epochs', settings.output.save_epochs),
        ('--model-ema', settings.model.model_ema),
        ('--watch-features', settings.loop.watch_features),
        ('--catch-diverged', settings.loop.catch_diverged),
        ('--contrast-batch-size', settings.data.contrast_batches > 1),
        ('--freeze-epochs', settings.optimization.freeze_epochs),
        ('--lora-rank', settings.model.lora_rank),
        (f'--method {method}', method and METHODS[method].keeps_copy),
    ):
        if given:
            raise ValueError(f'{flag} needs whole weights on every process, which {name} shards. Use DDP, or leave it.')
    if accelerator.distributed_type == DistributedType.DEEPSPEED and settings.optimization.grad_accum_steps > 1:
        raise ValueError('--grad-accum-steps: DeepSpeed updates by itself. Raise --batch-size, or use DDP.')


def start_trackers(output: OutputSettings, values: Mapping[str, Any], accelerator: Accelerator, folder: str) -> None:
    """Start the trackers of accelerate.

    Args:
        output: Project, tags and id of the run in the trackers.
        values: Settings of the run by name, without secrets, shown by the trackers.
        accelerator: Accelerator that was created with the trackers.
        folder: Run folder.
    """
    if not accelerator.log_with:
        return
    config = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in values.items()}
    name = os.path.basename(folder)
    wandb: Dict[str, Any] = dict(name=name, tags=redact_values(output.wandb_tags))
    if output.wandb_resume_id:
        wandb.update(id=output.wandb_resume_id, resume='must')
    accelerator.project_configuration.logging_dir = folder
    with redacted_command_line():
        accelerator.init_trackers(
            redact(output.wandb_project or 'timm_coretune'),
            config,
            init_kwargs={'wandb': wandb, 'trackio': {'name': name}},
        )
