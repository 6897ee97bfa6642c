"""Device, processes, precision and trackers: what accelerate is told"""

import argparse
import logging
import os

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType

from .cli.arguments import ParsedArguments, split_names
from .run.folder import DEFAULT_OUTPUT

_logger = logging.getLogger(__name__)


def create_accelerator(parsed: ParsedArguments) -> Accelerator:
    """Device, processes and precision: those of accelerate launch, and --amp where it was given no precision."""
    args, mixed_precision = parsed.args, None
    launched = os.environ.get('ACCELERATE_MIXED_PRECISION', 'no')
    if args.amp and launched == 'no':
        mixed_precision = {'float16': 'fp16', 'bfloat16': 'bf16'}[args.amp_dtype]
    elif args.amp:
        _logger.warning(f'accelerate launch was given --mixed_precision {launched}, which wins over --amp.')
    if 'MASTER_PORT' in os.environ and 'RANK' not in os.environ and 'ACCELERATE_MIXED_PRECISION' in os.environ:
        _logger.warning(
            'accelerate launch --cpu starts one process, whatever --num_processes says. For several use '
            'accelerate launch --multi_gpu --num_processes N train.py --device cpu, or a file of configs/.'
        )
    trackers = split_names(args.log_with)
    if args.log_wandb and 'wandb' not in trackers:
        trackers.append('wandb')
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        cpu=args.device == 'cpu' or not torch.accelerator.is_available(),
        log_with=trackers or None,
        project_dir=args.output or DEFAULT_OUTPUT,  # until the folder of the run is known
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=not args.no_ddp_bb)],
    )
    missing = sorted(set(trackers) - {'all'} - {str(getattr(name, 'value', name)) for name in accelerator.log_with})
    if missing:  # accelerate leaves them out in silence
        raise ValueError(f'--log-with {", ".join(missing)}: not installed. Install the package of that name.')
    if 'device' in parsed.given and accelerator.device.type != args.device:
        raise ValueError(
            f'Expected --device {args.device}, accelerate found {accelerator.device.type}. Check the installation of '
            'torch, and what accelerate launch was given.'
        )
    return accelerator


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether no process holds whole weights, or whole optimizer state."""
    return accelerator.is_fsdp2 or accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def check_strategy(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Stop where a way of distributing excludes an option.

    Raises:
        ValueError: It does.
    """
    if os.environ.get('ACCELERATE_USE_FSDP') == 'true' and not is_sharded(accelerator):
        _logger.warning('accelerate does not shard by FSDP on this device: training by DistributedDataParallel.')
    if not is_sharded(accelerator):
        return
    name = accelerator.distributed_type.value
    for flag, given in (
        ('--resume', args.resume),
        ('--recovery-interval', args.recovery_interval),
        ('--model-ema', args.model_ema),
        ('--freeze-epochs', args.freeze_epochs),
    ):
        if given:
            raise ValueError(f'{flag} needs whole weights on every process, which {name} shards. Use DDP, or leave it.')
    if accelerator.distributed_type == DistributedType.DEEPSPEED and args.grad_accum_steps > 1:
        raise ValueError('--grad-accum-steps: DeepSpeed updates by itself. Raise --batch-size, or use DDP.')


def start_trackers(args: argparse.Namespace, accelerator: Accelerator, folder: str) -> None:
    """Start the trackers of accelerate."""
    if not accelerator.log_with:
        return
    config = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in vars(args).items()}
    wandb = dict(name=os.path.basename(folder), tags=args.wandb_tags)
    if args.wandb_resume_id:
        wandb.update(id=args.wandb_resume_id, resume='must')
    accelerator.project_configuration.logging_dir = folder
    accelerator.init_trackers(args.wandb_project or 'timm_coretune', config, init_kwargs={'wandb': wandb})
