"""What a run leaves on disk: checkpoints to continue from, weights to use, a summary"""

import argparse
import logging
import os
from datetime import datetime
from typing import Dict, Optional, Tuple

import torch
from safetensors.torch import save
from timm.models import safe_model_name
from timm.task import TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, get_outdir, get_state_dict, update_summary

_logger = logging.getLogger(__name__)

WEIGHTS_NAME = 'model_best.safetensors'
LAST_NAME = 'last.pth.tar'
SUMMARY_NAME = 'summary.csv'


def create_output_dir(args: argparse.Namespace, img_size: int) -> str:
    """Make the folder of the run, named as timm names it."""
    name = args.experiment or '-'.join(
        [datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model), str(img_size)]
    )
    return get_outdir(args.output or './output/train', name)


def save_weights(model: torch.nn.Module, path: str) -> None:
    """Write the weights as safetensors that plain `timm.create_model(checkpoint_path=path)` loads, all or nothing."""
    # clones, as safetensors refuses tensors that share memory
    tensors = {k: v.detach().cpu().clone().contiguous() for k, v in get_state_dict(model).items()}
    temporary = f'{path}.tmp'
    with open(temporary, 'wb') as f:  # save_file would leave the file readable to its owner alone
        f.write(save(tensors, metadata={'format': 'pt'}))
    os.replace(temporary, path)


def resume(args: argparse.Namespace, task: TrainingTask, optimizer: torch.optim.Optimizer) -> int:
    """Continue from --resume and return the epoch to start with.

    Raises:
        ValueError: There is no such checkpoint.
    """
    if not args.resume:
        return args.start_epoch or 0
    if not os.path.isfile(args.resume):
        raise ValueError(f'Expected a checkpoint of train.py in --resume {args.resume!r}, found none. Check the path.')
    epoch = resume_task_checkpoint(task, args.resume, optimizer=None if args.no_resume_opt else optimizer)
    return (epoch or 0) if args.start_epoch is None else args.start_epoch


def setup_ema(args: argparse.Namespace, task: TrainingTask) -> None:
    """Start the moving average of the weights, or continue that of --resume."""
    if not args.model_ema:
        return
    task.setup_ema(
        decay=args.model_ema_decay,
        use_warmup=args.model_ema_warmup,
        device='cpu' if args.model_ema_force_cpu else None,
    )
    if args.resume:
        load_task_ema_checkpoint(task, args.resume)


class RunRecord:
    """Writes the folder of a run, on the main process.

    Args:
        args: Arguments of the run.
        args_text: The same as YAML.
        output_dir: The folder.
        task: What is trained.
        optimizer: Its optimizer.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        args_text: str,
        output_dir: str,
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
    ):
        self.output_dir = output_dir
        self.task = task
        self.eval_metric = args.eval_metric
        self.publish_ema = args.model_ema and not args.model_ema_force_cpu
        self.best: Tuple[Optional[float], Optional[int]] = (None, None)
        self.saver = CheckpointSaver(
            model=task.get_eval_model(),
            optimizer=optimizer,
            args=args,
            checkpoint_dir=output_dir,
            recovery_dir=output_dir,
            decreasing=args.eval_metric == 'loss',
            max_history=args.checkpoint_hist,
            task=task,
        )
        if args.resume and hasattr(self.saver, 'load_state_dict_from_checkpoint'):  # since timm 1.0.30
            self.saver.load_state_dict_from_checkpoint(args.resume)
            self.best = (self.saver.best_metric, self.saver.best_epoch)
        with open(self.path('args.yaml'), 'w') as f:
            f.write(args_text)

    def path(self, name: str) -> str:
        return os.path.join(self.output_dir, name)

    def save_recovery(self, epoch: int, update: int) -> None:
        self.saver.save_recovery(epoch, batch_idx=update)

    def save_epoch(
        self,
        epoch: int,
        lr: float,
        train_metrics: Dict[str, float],
        eval_metrics: Optional[Dict[str, float]],
    ) -> None:
        """Add a row to the summary, save a checkpoint, and the weights when they are the best so far."""
        summary = self.path(SUMMARY_NAME)
        update_summary(
            epoch, train_metrics, eval_metrics, filename=summary, lr=lr, write_header=not os.path.exists(summary)
        )
        metric = (eval_metrics or train_metrics)['loss' if eval_metrics is None else self.eval_metric]
        self.best = self.saver.save_checkpoint(epoch, metric=metric)
        if self.best[1] == epoch:
            save_weights(self.task.get_eval_model(ema=self.publish_ema), self.path(WEIGHTS_NAME))
