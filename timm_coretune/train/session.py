"""One training run, from its settings to its results"""

import functools
import importlib
import logging
import os
from types import ModuleType
from typing import Any, Dict, List, NamedTuple, Optional, cast

import torch
from accelerate import Accelerator
from filelock import FileLock
from huggingface_hub import get_token
from timm.utils import random_seed, setup_default_logging, unwrap_model

from ..hub.connection import quiet_requests
from ..loss import METHODS
from ..redaction import redact, redact_values
from ..report.create import report_at_end
from ..report.plots import create_figure
from ..run_folder import ARGS_NAME
from ..task import CoreTuningTask
from . import classification, segmentation
from .cli.arguments import ParsedArguments
from .cli.errors import DivergedError, asked_by
from .cli.settings import ModelSettings, SavedArguments, Settings
from .data.datasets import Datasets
from .data.loaders import Loaders, count_contrast_batches, mean_batch_size
from .freezing import BackboneFreezer
from .loop import Trainer
from .loop_config import LoopConfig
from .model import adapt_model, check_single_images, compile_task, place_model, resolve_num_classes, setup_ema
from .optimization import (
    clip_gradients,
    count_accumulated,
    create_optimizer,
    create_schedule,
    epochs_to_train,
    resolve_lr,
)
from .preemption import Preempted, StopRequest
from .processes import check_strategy, create_accelerator, is_sharded, precision_of, share_batch, start_trackers
from .run.collapse import watch_two_classes
from .run.finish import describe_continuation, draw_tables, log_best, print_results, push, reason_to_stop, write_results
from .run.first_lines import describe_versions, log_average, log_data, log_optimization, log_update_size
from .run.folder import default_name, take_folder
from .run.memory import batch_shape, log_memory
from .run.place import place_in_epoch
from .run.record import RunRecord
from .run.resume import resolve_resume, resume, without_lost_checkpoint
from .watching.features import FeatureWatch
from .watching.trackers import Pictures
from .weights import check_model_name, warn_of_random_weights

_logger = logging.getLogger(__name__)


def kind_of(settings: Settings) -> ModuleType:
    """The module that creates the parts of this run: `segmentation` or `classification`, with the same functions."""
    return segmentation if settings.data.segmentation else classification


class Resolved(NamedTuple):
    """Values that follow from the settings once data, processes and model are known.

    Attributes:
        lr: Learning rate.
        eval_metric: Score that selects the best epoch. 'loss', the training loss, if nothing is validated.
        num_classes: Number of classes of the model.
    """

    lr: float
    eval_metric: str
    num_classes: int


class Run(NamedTuple):
    """A run that is set up and ready to train.

    Attributes:
        trainer: Trains and validates.
        loaders: Training and validation batches.
        epochs: Epochs still to train.
        start_batch: Batch of the first of these epochs to start at.
        over: Why there is nothing left to train in a run that is continued, empty if there is.
        resolved: Values that follow from the settings.
        lock: Lock on the run folder, None on processes that do not write into it.
    """

    trainer: Trainer
    loaders: Loaders
    epochs: range
    start_batch: int
    over: str
    resolved: Resolved
    lock: Optional[FileLock]


def create_loop_config(settings: Settings, eval_metric: str, reference_batch_size: float = 1.0) -> LoopConfig:
    """Options of the training loop, taken from the settings.

    Args:
        settings: The settings.
        eval_metric: Score that selects the best epoch.
        reference_batch_size: Batch size at which the loss is not scaled.
    """
    data, loop = settings.data, settings.loop
    loss_scale = 'none'
    if data.naflex_loader:
        loss_scale = data.naflex_loss_scale
    elif data.train_img_sizes:
        loss_scale = data.variable_batch_loss_scale
    return LoopConfig(
        seed=loop.seed,
        contrast_batches=data.contrast_batches,
        grad_accum_steps=settings.optimization.grad_accum_steps,
        channels_last=settings.model.channels_last,
        dtype=getattr(torch, settings.model.model_dtype) if settings.model.model_dtype else None,
        loss_scale=loss_scale,
        reference_batch_size=reference_batch_size,
        uneven_batches=data.naflex_loader,
        log_interval=loop.log_interval,
        val_interval=loop.val_interval,
        save_epochs=tuple(settings.output.save_epochs),
        recovery_interval=settings.output.recovery_interval,
        synchronize_step=loop.synchronize_step,
        dist_bn='' if settings.model.sync_bn else loop.dist_bn,
        validate_ema=not settings.model.model_ema_force_cpu,
        ema_publish=settings.model.model_ema_publish,
        tta=loop.tta,
        eval_metric=eval_metric,
        patience=loop.patience,
        mixup_off_epoch=data.mixup_off_epoch,
        catch_diverged=loop.catch_diverged,
    )


def set_up(
    parsed: ParsedArguments,
    kind: ModuleType,
    accelerator: Accelerator,
    datasets: Datasets,
    stop: Optional[StopRequest] = None,
) -> Run:
    """Create all parts of a run, in the order of timm's script. The training loop asks `stop` whether to end early."""
    settings = parsed.settings
    is_main, num_processes = accelerator.is_main_process, accelerator.num_processes
    state_path = resolve_resume(settings.output, accelerator)
    num_classes = resolve_num_classes(settings.model.num_classes, datasets.num_classes)
    creation = without_lost_checkpoint(settings, state_path)
    plain_model, data_config = kind.create_model(creation, num_classes, is_main)
    adapt_model(settings.model, plain_model, data_config)
    if datasets.train is not None:
        check_single_images(settings, plain_model, data_config, num_processes)
    model = place_model(settings.model, plain_model, accelerator, settings.data.aug_splits)
    if is_main:
        warn_of_random_weights(settings, state_path)
    with asked_by('--aa, --interpolation and other flags of images and batches'):
        loaders = kind.create_loaders(settings, data_config, model, datasets, accelerator)
    with asked_by('--loss, --kd-model-name and other flags of the loss'):
        task = kind.create_task(settings, model, datasets, accelerator.device, is_main)
    log_data(datasets)
    name = settings.loss.task_loss
    if name is not None and METHODS[name].contrasts and datasets.train is not None:
        kind.log_contrast(settings, datasets, num_processes)

    # from here on a batch is one that is contrasted, of several batches of the loader with --contrast-batch-size
    optimization, contrast_batches = settings.optimization, settings.data.contrast_batches
    batch_size = contrast_batches * mean_batch_size(settings.data, loaders.train)
    num_batches = None if loaders.train is None else count_contrast_batches(settings.data, len(loaders.train))
    accum = count_accumulated(optimization.grad_accum_steps, num_batches)
    resolved = Resolved(
        lr=resolve_lr(optimization, batch_size, num_processes, num_batches),
        eval_metric='loss' if datasets.validation is None else settings.loop.eval_metric,
        num_classes=cast(int, model.num_classes),
    )
    values = redact_values({**settings.flat(), 'lr': resolved.lr, 'eval_metric': resolved.eval_metric})
    with asked_by('--opt, --opt-kwargs and other flags of the optimizer'):
        optimizer = create_optimizer(optimization, task, resolved.lr)
    continuation = resume(state_path, task, optimizer, not settings.output.no_resume_opt, values)
    continuation = place_in_epoch(continuation, values, num_processes, loaders.train)
    setup_ema(settings.model, task, state_path)
    is_of_images = not (settings.loop.eval_only or settings.data.naflex_loader)  # NaFlex takes patches
    if is_main and is_of_images and not is_sharded(accelerator):
        shape = batch_shape(settings.data, data_config['input_size'])
        dtype = getattr(torch, settings.model.model_dtype or 'float32')
        log_memory(task, optimizer, shape, accelerator.autocast, num_processes, dtype)
    compile_task(settings.model, task)

    start_epoch, start_batch = continuation.epoch, continuation.batch
    if settings.loop.start_epoch is not None:
        start_epoch, start_batch = settings.loop.start_epoch, 0
    updates_per_epoch = 1 if num_batches is None else -(-num_batches // accum)
    with asked_by('--sched and other flags of the learning rate'):
        scheduler, num_epochs = create_schedule(
            optimization, optimizer, updates_per_epoch, resolved.eval_metric, settings.loop.seed
        )
    if scheduler is not None and (start_epoch or start_batch):
        if optimization.sched_on_updates:
            scheduler.step_update(start_epoch * updates_per_epoch - (-start_batch // (accum * contrast_batches)))
        else:
            scheduler.step(start_epoch)
    freezer = BackboneFreezer(task, optimization.freeze_epochs) if optimization.freeze_epochs else None
    if freezer is not None and freezer.start_epoch(start_epoch):
        _logger.info(f'Only the head trains for {optimization.freeze_epochs} epoch(s).')
    if isinstance(task, CoreTuningTask):
        task.attach_optimizer(optimizer)
        task.start(num_epochs * updates_per_epoch)
    log_update_size(settings.data.batch_size * contrast_batches, accum, num_processes, updates_per_epoch)
    log_optimization(task, optimizer, scheduler, num_epochs, updates_per_epoch)
    if not settings.loop.eval_only:
        log_average(task.get_trainable_module(ema=True), num_epochs * updates_per_epoch)

    record, lock, folder = None, None, ''
    if not settings.loop.eval_only:
        if is_main:
            name = default_name(settings.model.model, data_config['input_size'][-1])
            folder, lock = take_folder(settings.output, name, state_path)
            _logger.info(f'Output: {folder}')
            try:
                kind.save_config(plain_model, folder, data_config, datasets.class_names)
            except ValueError as e:  # training works without it
                _logger.warning(f'There will be no {kind.CONFIG}, and no push to the Hub: {e}')
        record = RunRecord(
            folder,
            task,
            optimizer,
            accelerator,
            settings.output,
            SavedArguments(**values),
            publish_ema=settings.model.model_ema and not settings.model.model_ema_force_cpu,
        )
        if datasets.validated_on is not None:
            record.notes['validated_on'] = redact(datasets.validated_on)
        record.facts = dict(
            num_updates=num_epochs * updates_per_epoch,
            num_classes=resolved.num_classes,
            compiled=settings.model.torchcompile is not None,
        )
        continuation = record.continue_from(continuation)
        start_trackers(settings.output, values, accelerator, folder)
    watch = None
    loop_config = create_loop_config(settings, resolved.eval_metric, batch_size)
    if loaders.watched is not None:
        held_out, bank = loaders.watched
        interval, memory = settings.loop.watch_features, (loop_config.channels_last, loop_config.dtype)
        watch = FeatureWatch(held_out, bank, interval, accelerator, *memory)
    pictures = None
    # all processes look for mistakes, but not all have the trackers
    if accelerator.log_with and not settings.loop.eval_only and not settings.data.naflex_loader:
        pictures = Pictures(accelerator, data_config['mean'], data_config['std'], datasets.class_names)
    trainer = Trainer(
        task,
        optimizer,
        accelerator,
        scheduler=scheduler,
        config=loop_config,
        mixup_fn=loaders.mixup_fn,
        clip_gradients=functools.partial(clip_gradients, optimization, accelerator, task),
        freezer=freezer,
        record=record,
        evaluator=kind.create_evaluator(settings, resolved.num_classes, datasets.class_names, accelerator.device),
        stop=stop,
        watch=watch,
        pictures=pictures,
    )
    trainer.best = continuation.best
    if continuation.loop_state:
        trainer.load_state_dict(continuation.loop_state)
    num_wanted = epochs_to_train(num_epochs, settings.loop.stop_epoch, settings.output.save_epochs)
    epochs, over = range(start_epoch, num_wanted), ''
    if state_path is not None and settings.loop.start_epoch is None and not start_batch:
        over = reason_to_stop(trainer, epochs, num_epochs)
    if record is not None and not (over and os.path.exists(record.path(ARGS_NAME))):  # what trained stays in the file
        came_to = ', '.join(f'{name} {value}' for name, value in resolved._asdict().items())
        came_to += f', device {accelerator.device.type}, {num_processes} process(es)'
        record.write_args(f'{parsed.text}# in this run: {came_to}\n# versions: {describe_versions()}\n')
    return Run(trainer, loaders, epochs, start_batch, over, resolved, lock)


def prepare_process(parsed: ParsedArguments) -> Accelerator:
    """Set up logging, device, processes and random seeds in this process."""
    loop = parsed.settings.loop
    for name in loop.device_modules or ():  # importing them registers further kinds of devices
        importlib.import_module(name)
    setup_default_logging(default_level=logging.INFO if int(os.environ.get('RANK', 0)) == 0 else logging.WARNING)
    quiet_requests()
    with asked_by('--device, --amp, --log-with and the options of accelerate launch'):
        accelerator = create_accelerator(loop, parsed.settings.output, 'device' in parsed.given)
    check_strategy(parsed.settings, accelerator)
    if parsed.assumed:
        _logger.info(parsed.assumed)
    _logger.info(
        f'Training with {accelerator.num_processes} process(es) on {accelerator.device}, mixed precision: '
        f'{precision_of(accelerator)}.'
    )
    if accelerator.device.type == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    # all processes need the same seed to create the same new weights; later the loop seeds each process differently
    random_seed(loop.seed)
    return accelerator


def _summarize(
    kind: ModuleType, settings: ModelSettings, record: RunRecord, trainer: Trainer, datasets: Datasets
) -> None:
    """Log the best score and where its weights are, and draw pictures of the run."""
    if trainer.best[0] is None:
        return
    num_classes = unwrap_model(trainer.task.get_eval_model()).num_classes
    log_best(record, trainer, kind.load_hint(settings, num_classes, record.folder))
    try:
        draw_tables(record)
        picture = kind.draw(record.folder, datasets)
        if picture is not None:
            _logger.info(f'Predictions: {picture}')
    except ImportError as e:
        _logger.info(str(e))


def run(parsed: ParsedArguments, argv: List[str]) -> List[Dict[str, Any]]:
    """Train and return the metrics of each validated epoch. argv only serves to log the command that continues.

    Raises:
        Preempted: SIGTERM, SIGUSR1 or --time-limit stopped the run. If it was training, a state is saved.
    """
    with StopRequest(parsed.settings.loop.time_limit) as stop:
        try:
            return _run(parsed, argv, stop)
        except Preempted as e:
            if not stop.is_training:
                _logger.warning(
                    f'Stopped by {e.reason} before the first batch: nothing was trained, so nothing is saved. Run the '
                    'same command again.'
                )
            raise


def _run(parsed: ParsedArguments, argv: List[str], stop: StopRequest) -> List[Dict[str, Any]]:
    accelerator = prepare_process(parsed)
    parsed = parsed._replace(settings=share_batch(parsed.settings, accelerator.num_processes))
    settings, output = parsed.settings, parsed.settings.output
    kind = kind_of(settings)
    check_model_name(settings.model.model, settings.model.pretrained)
    if settings.loss.kd_model_name:
        check_model_name(settings.loss.kd_model_name, flag='--kd-model-name')
    if output.report:
        create_figure()  # without matplotlib this says so before anything is trained
    datasets = kind.open_datasets(settings)
    trainer, loaders, epochs, start_batch, over, resolved, lock = set_up(parsed, kind, accelerator, datasets, stop)
    record = cast(Optional[RunRecord], trainer.record)
    if record is None:  # nothing is trained, so a signal ends this at once
        metrics = trainer.validator.evaluate(loaders.validation)
        if accelerator.is_main_process:
            print_results([{'validation': metrics}], resolved.eval_metric)
            if settings.loop.eval_output is not None:
                write_results(settings.loop.eval_output, metrics, trainer.validator.scored, parsed.text)
        return [{'validation': metrics}]
    if output.push_to_hub and accelerator.is_main_process and get_token() is None:
        _logger.warning('There is no token to push to the Hub with: `hf auth login` before this run is over.')
    stop.start_training()
    results: List[Dict[str, Any]] = []
    is_over = False
    try:
        if over:
            _logger.info(over)
        else:
            two_classes = watch_two_classes(settings, trainer, loaders.validation, datasets.class_names)
            if two_classes is not None and not epochs.start and not start_batch:
                two_classes.look_before()
            results = trainer.fit(loaders.train, loaders.validation, epochs, start_batch)
            if two_classes is not None:
                two_classes.look_after()
        record.finish()
        is_over = True
        stop.restore_handlers()
    except KeyboardInterrupt:
        _logger.info(f'Interrupted{describe_continuation(argv, record, accelerator)}')
    except Preempted as e:
        _logger.info(f'Stopped by {e.reason}{describe_continuation(argv, record, accelerator)}')
        accelerator.wait_for_everyone()  # a launcher ends all processes as soon as the first has ended
        accelerator.end_training()
        if lock is not None:
            lock.release()
        raise
    except DivergedError as e:
        state = f'The last state before is {record.last_state}.' if record.last_state else 'There is no state before.'
        raise DivergedError(f'{e} {state}') from None
    if accelerator.is_main_process:
        _summarize(kind, settings.model, record, trainer, datasets)
        if results:
            print_results(results, resolved.eval_metric)
    accelerator.end_training()
    if output.report and accelerator.is_main_process:
        report_at_end(record.folder, is_over, accelerator.device)
    if output.push_to_hub and accelerator.is_main_process:
        push(output, record.folder, is_over)
        _logger.info(f'Load it: {kind.load_pushed_hint(output.push_to_hub)}')
    if lock is not None:
        lock.release()
    return results
