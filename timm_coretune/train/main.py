"""A run from the command line to the last line of its log"""

import argparse
import functools
import logging
import os
import sys
from typing import Any, Dict, List, NamedTuple, Optional

import torch
from accelerate import Accelerator
from huggingface_hub import get_token
from timm.data import resolve_data_config
from timm.utils import random_seed, setup_default_logging

from ..evaluation.classification import ClassificationEvaluator
from ..export import create_config, write_json
from ..hub.upload import quiet_requests
from ..run_folder import CONFIG_NAME, SEGMENTATION_CONFIG_NAME
from ..segmentation import SegmentationEvaluator
from ..segmentation.export import write_segmentation_config
from .cli.arguments import ParsedArguments, import_device_modules, parse_args, split_names
from .data.datasets import Datasets, create_datasets
from .data.loaders import LoaderFactory, Loaders, mean_batch_size
from .freezing import BackboneFreezer
from .loop import LoopConfig, Trainer
from .loss_meter import DivergedError
from .model import create_backbone, create_task, place_model, resolve_num_classes
from .optimization import clip_gradients, create_optimizer, create_schedule, resolve_lr
from .processes import check_strategy, create_accelerator, start_trackers
from .run.finish import continue_command, print_results, push, summarize
from .run.first_lines import log_contrast, log_data, log_optimization
from .run.folder import DEFAULT_OUTPUT, take_folder
from .run.record import RunRecord
from .run.resume import RunState, resolve_resume, resume, setup_ema
from .segmentation import create_pixel_model, resolve_pixel_config

_logger = logging.getLogger(__name__)


class Run(NamedTuple):
    """All that trains.

    Attributes:
        trainer: What trains and validates.
        loaders: What it trains and validates on.
        epochs: Epochs still to train.
        start_batch: Batch of the first of them to start at.
        lock: Held as long as the folder is written.
    """

    trainer: Trainer
    loaders: Loaders
    epochs: range
    start_batch: int
    lock: Any


def create_loop_config(args: argparse.Namespace, loaders: Loaders) -> LoopConfig:
    """What the loop takes from the arguments."""
    scaled = args.naflex_loader or args.train_img_sizes
    return LoopConfig(
        seed=args.seed,
        grad_accum_steps=args.grad_accum_steps,
        channels_last=args.channels_last,
        dtype=getattr(torch, args.model_dtype) if args.model_dtype else None,
        loss_scale=(args.naflex_loss_scale if args.naflex_loader else args.variable_batch_loss_scale)
        if scaled
        else 'none',
        reference_batch_size=mean_batch_size(args, loaders.train),
        uneven_batches=args.naflex_loader,
        log_interval=args.log_interval,
        val_interval=args.val_interval,
        recovery_interval=args.recovery_interval,
        synchronize_step=args.synchronize_step,
        dist_bn='' if args.sync_bn else args.dist_bn,
        validate_ema=not args.model_ema_force_cpu,
        tta=args.tta,
        eval_metric=args.eval_metric,
        patience=args.patience,
        mixup_off_epoch=args.mixup_off_epoch,
    )


def set_up(parsed: ParsedArguments, accelerator: Accelerator, datasets: Datasets) -> Run:
    """Create everything, in the order timm's script does."""
    args = parsed.args
    folder = os.path.join(args.output or DEFAULT_OUTPUT, args.experiment)
    state_path = resolve_resume(args, accelerator, folder)
    num_classes = resolve_num_classes(args, datasets.num_classes)
    plain_model = create_backbone(args, 0 if args.segmentation else num_classes)
    data_config = resolve_data_config(vars(args), model=plain_model, verbose=accelerator.is_main_process)
    if args.segmentation:
        data_config = resolve_pixel_config(data_config)
        plain_model = create_pixel_model(args, plain_model, num_classes, data_config)
    model = place_model(args, plain_model, accelerator)
    loaders = LoaderFactory(args, data_config, model, accelerator).create(datasets)
    task = create_task(args, model, accelerator)
    log_data(datasets)
    if args.coretune and datasets.train is not None:
        log_contrast(args, datasets, accelerator.num_processes)

    args.lr = resolve_lr(args, mean_batch_size(args, loaders.train), accelerator.num_processes)
    optimizer = create_optimizer(args, task)
    run_state = RunState(accelerator)
    resume(args, state_path, task, optimizer, run_state)
    setup_ema(args, task, state_path)
    if args.torchcompile:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        if task.has_ema():
            task.compile_ema(backend=args.torchcompile, mode=args.torchcompile_mode)

    start_epoch, start_batch = run_state.values.get('epoch', 0), run_state.values.get('batch', 0)
    if args.start_epoch is not None:
        start_epoch, start_batch = args.start_epoch, 0
    updates_per_epoch = 1 if loaders.train is None else -(-len(loaders.train) // args.grad_accum_steps)
    scheduler, num_epochs = create_schedule(args, optimizer, updates_per_epoch)
    if scheduler is not None and (start_epoch or start_batch):
        if args.sched_on_updates:
            scheduler.step_update(start_epoch * updates_per_epoch + start_batch // args.grad_accum_steps)
        else:
            scheduler.step(start_epoch)
    freezer = BackboneFreezer(task, args.freeze_epochs) if args.freeze_epochs else None
    if freezer is not None and freezer.start_epoch(start_epoch):
        _logger.info(f'Only the head trains for {args.freeze_epochs} epoch(s).')
    log_optimization(args, task, optimizer, scheduler, num_epochs, updates_per_epoch, accelerator.num_processes)

    record, lock = None, None
    if not args.eval_only:
        folder = ''
        if accelerator.is_main_process:
            folder, lock = take_folder(args, data_config['input_size'][-1], state_path)
            _logger.info(f'Output: {folder}')
            save_config(args, plain_model, folder, data_config, datasets.class_names)
        record = RunRecord(args, parsed.text, folder, task, optimizer, run_state)
        if state_path is not None:
            record.continue_from(state_path)
        start_trackers(args, accelerator, folder)
    if args.segmentation:
        evaluator = SegmentationEvaluator(num_classes, datasets.class_names, device=accelerator.device)
    else:
        evaluator = ClassificationEvaluator(
            accelerator.device, split_names(args.metrics), model.num_classes, datasets.class_names
        )
    trainer = Trainer(
        task,
        optimizer,
        accelerator,
        scheduler=scheduler,
        config=create_loop_config(args, loaders),
        mixup_fn=loaders.mixup_fn,
        clip_gradients=functools.partial(clip_gradients, args, accelerator, task),
        freezer=freezer,
        record=record,
        evaluator=evaluator,
    )
    run_state.restore(trainer)
    return Run(trainer, loaders, range(start_epoch, num_epochs), start_batch, lock)


def save_config(
    args: argparse.Namespace,
    model: torch.nn.Module,
    folder: str,
    data_config: Dict[str, Any],
    class_names: Optional[List[str]],
) -> None:
    """Write what is needed to build the model around the weights of the folder: plain timm's, or that of pixels."""
    name = SEGMENTATION_CONFIG_NAME if args.segmentation else CONFIG_NAME
    try:
        if args.segmentation:
            path = os.path.join(folder, name)
            write_segmentation_config(model, path, data_config, class_names)
        else:
            write_json(create_config(model, data_config, class_names), os.path.join(folder, name))
    except ValueError as e:  # no reason not to train
        _logger.warning(f'There will be no {name}, and no push to the Hub: {e}')


def run(parsed: ParsedArguments, argv: List[str]) -> List[Dict[str, Any]]:
    """Train as parsed, and return what each validated epoch gave. The command that continues is made of argv."""
    args = parsed.args
    import_device_modules(args)
    setup_default_logging(default_level=logging.INFO if int(os.environ.get('RANK', 0)) == 0 else logging.WARNING)
    quiet_requests()
    accelerator = create_accelerator(parsed)
    check_strategy(args, accelerator)
    if parsed.assumed:
        _logger.info(parsed.assumed)
    _logger.info(
        f'Training with {accelerator.num_processes} process(es) on {accelerator.device}, mixed precision: '
        f'{accelerator.mixed_precision}.'
    )
    if accelerator.device.type == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    # alike on all processes: the weights that the checkpoint lacks must be; the loop seeds each process by itself
    random_seed(args.seed)
    datasets = create_datasets(args)
    if datasets.validation is None:
        args.eval_metric = 'loss'
    trainer, loaders, epochs, start_batch, lock = set_up(parsed, accelerator, datasets)
    record = trainer.record
    if args.eval_only:
        metrics = trainer.evaluate(loaders.validation)
        if accelerator.is_main_process:
            print_results([{'validation': metrics}], args.eval_metric)
        return [{'validation': metrics}]
    if args.push_to_hub and accelerator.is_main_process and get_token() is None:
        _logger.warning('There is no token to push to the Hub with: `hf auth login` before this run is over.')
    results, is_over = [], False
    try:
        results = trainer.fit(loaders.train, loaders.validation, epochs, start_batch)
        record.finish()
        is_over = True
    except KeyboardInterrupt:
        if record.last_state:
            _logger.info(f'Interrupted. Continue with:\n{continue_command(argv, record.folder)}')
        else:
            _logger.info('Interrupted in the first epoch, before a checkpoint: start anew to continue.')
    except DivergedError as e:
        state = f'The last state before is {record.last_state}.' if record.last_state else 'There is no state before.'
        raise DivergedError(f'{e} {state}') from None
    if accelerator.is_main_process:
        summarize(record, trainer, args, datasets)
        print_results(results, args.eval_metric)
    accelerator.end_training()
    if args.push_to_hub and accelerator.is_main_process:
        push(args, record.folder, is_over)
    if lock is not None:
        lock.release()
    return results


def main(argv: Optional[List[str]] = None) -> None:
    """Entry point of train.py and `python -m timm_coretune.train`."""
    argv = sys.argv[1:] if argv is None else argv
    run(parse_args(argv), argv)
