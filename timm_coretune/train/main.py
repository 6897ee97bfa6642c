"""A run from the command line to the last line of its log"""

import argparse
import functools
import logging
import os
import shlex
import sys
from typing import List, Optional

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from timm.data import resolve_data_config
from timm.utils import distribute_bn, random_seed, setup_default_logging

from ..report import plot_curves
from .arguments import ParsedArguments, parse_args
from .data import Loaders, create_datasets, create_loaders, set_epoch
from .loop import Trainer
from .model import create_backbone, create_task, place_model, resolve_num_classes
from .optimization import clip_gradients, create_optimizer, create_schedule, resolve_lr
from .state import LAST_NAME, SUMMARY_NAME, WEIGHTS_NAME, RunRecord, create_output_dir, resume, setup_ema

_logger = logging.getLogger(__name__)


def create_accelerator(args: argparse.Namespace) -> Accelerator:
    """Device, processes and precision: those of accelerate launch, and --amp where it was given no precision."""
    mixed_precision = None
    if args.amp:
        mixed_precision = {'float16': 'fp16', 'bfloat16': 'bf16'}[args.amp_dtype]
        if os.environ.get('ACCELERATE_MIXED_PRECISION', 'no') != 'no':
            mixed_precision = None
    return Accelerator(
        mixed_precision=mixed_precision,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=not args.no_ddp_bb)],
    )


def run_epochs(
    args: argparse.Namespace,
    trainer: Trainer,
    loaders: Loaders,
    record: Optional[RunRecord],
    epochs: range,
) -> None:
    """Train, validate and save, epoch by epoch. record is None on all processes but the main one."""
    task, scheduler, num_processes = trainer.task, trainer.scheduler, trainer.accelerator.num_processes
    with_ema = task.has_ema() and not args.model_ema_force_cpu
    for epoch in epochs:
        set_epoch(loaders.train, epoch)
        if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
            for mixup in (loaders.train, trainer.mixup_fn):
                if getattr(mixup, 'mixup_enabled', False):
                    mixup.mixup_enabled = False
        train_metrics = trainer.train_one_epoch(epoch, loaders.train)
        lrs = [group['lr'] for group in trainer.optimizer.param_groups]
        metric = None
        if (epoch + 1) % args.val_interval == 0 or epoch + 1 == epochs.stop:
            if num_processes > 1 and args.dist_bn in ('broadcast', 'reduce') and not args.sync_bn:
                for model in [task.get_eval_model()] + ([task.get_eval_model(ema=True)] if with_ema else []):
                    distribute_bn(model, num_processes, args.dist_bn == 'reduce')
            eval_metrics = None
            if loaders.validation is not None:
                eval_metrics = trainer.validate(loaders.validation)
                if with_ema:
                    eval_metrics = trainer.validate(loaders.validation, ema=True)
            metric = (eval_metrics or train_metrics).get(args.eval_metric)
            if record is not None:
                record.save_epoch(epoch, sum(lrs) / len(lrs), train_metrics, eval_metrics)
        if scheduler is not None:
            scheduler.step(epoch + 1, metric)


def continue_command(args: argparse.Namespace, argv: List[str], output_dir: str) -> str:
    """The command that continues an interrupted run in its folder."""
    folder, name = os.path.split(os.path.abspath(output_dir))
    words = ['--resume', os.path.join(output_dir, LAST_NAME), '--output', folder, '--experiment', name]
    return f'accelerate launch {shlex.quote(sys.argv[0])} {shlex.join([*argv, *words])}'


def summarize(record: RunRecord, args: argparse.Namespace, num_classes: int) -> None:
    """Say what came out and where it is."""
    metric, epoch = record.best
    if metric is None:
        return
    _logger.info(f'*** Best metric: {metric} (epoch {epoch})')
    weights = record.path(WEIGHTS_NAME)
    _logger.info(f'Weights: {weights}')
    _logger.info(
        f"Load them: timm.create_model('{args.model}', num_classes={num_classes}, checkpoint_path='{weights}')"
    )
    picture = record.path('curves.png')
    try:
        plot_curves(record.path(SUMMARY_NAME), picture)
        _logger.info(f'Curves: {picture}')
    except ImportError as e:
        _logger.info(str(e))


def run(parsed: ParsedArguments, argv: List[str]) -> None:
    """Train as parsed. argv is what the command to continue with is made of."""
    args = parsed.args
    accelerator = create_accelerator(args)
    setup_default_logging(default_level=logging.INFO if accelerator.is_main_process else logging.WARNING)
    if parsed.assumed:
        _logger.info(parsed.assumed)
    _logger.info(
        f'Training with {accelerator.num_processes} process(es) on {accelerator.device}, mixed precision: '
        f'{accelerator.mixed_precision}.'
    )
    if accelerator.device.type == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    random_seed(args.seed, accelerator.process_index)

    datasets = create_datasets(args)
    model = create_backbone(args, resolve_num_classes(args, datasets.num_classes))
    data_config = resolve_data_config(vars(args), model=model, verbose=accelerator.is_main_process)
    model = place_model(args, model, accelerator)
    loaders = create_loaders(args, datasets, data_config, model.num_classes, accelerator)
    soft_target = loaders.mixup_fn is not None or getattr(loaders.train, 'mixup_enabled', False)
    task = create_task(args, model, accelerator, soft_target)

    args.lr = resolve_lr(args, accelerator.num_processes)
    optimizer = create_optimizer(args, task)
    start_epoch = resume(args, task, optimizer)
    setup_ema(args, task)
    if args.torchcompile:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        if task.has_ema():
            task.compile_ema(backend=args.torchcompile, mode=args.torchcompile_mode)
    record = None
    if accelerator.is_main_process:
        output_dir = create_output_dir(args, data_config['input_size'][-1])
        record = RunRecord(args, parsed.text, output_dir, task, optimizer)

    updates_per_epoch = -(-len(loaders.train) // max(1, args.grad_accum_steps))
    scheduler, num_epochs = create_schedule(args, optimizer, updates_per_epoch)
    if scheduler is not None and start_epoch > 0:
        if args.sched_on_updates:
            scheduler.step_update(start_epoch * updates_per_epoch)
        else:
            scheduler.step(start_epoch)
    trainer = Trainer(
        task,
        optimizer,
        accelerator,
        scheduler=scheduler,
        grad_accum_steps=args.grad_accum_steps,
        clip_gradients=functools.partial(clip_gradients, args, accelerator, task),
        mixup_fn=loaders.mixup_fn,
        channels_last=args.channels_last,
        log_interval=args.log_interval,
        recovery_interval=args.recovery_interval if record else 0,
        save_recovery=record.save_recovery if record else None,
    )
    try:
        run_epochs(args, trainer, loaders, record, range(start_epoch, num_epochs))
    except KeyboardInterrupt:
        if record is not None:
            if os.path.exists(record.path(LAST_NAME)):
                _logger.info(f'Interrupted. Continue with:\n{continue_command(args, argv, record.output_dir)}')
            else:
                _logger.info('Interrupted in the first epoch, before a checkpoint: start anew to continue.')
    if record is not None:
        summarize(record, args, model.num_classes)
    accelerator.end_training()


def main(argv: Optional[List[str]] = None) -> None:
    """Entry point of train.py and `python -m timm_coretune.train`."""
    argv = sys.argv[1:] if argv is None else argv
    run(parse_args(argv), argv)
