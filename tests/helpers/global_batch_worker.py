"""One process of tests/train/test_global_batch.py: trains a part of several runs, and saves what every update saw

Run as `global_batch_worker.py RANK FOLDER`. FOLDER/job.pt says what to do.
"""

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from ranks import join_ranks, save_found
from timm import create_model
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, RandomSampler

from timm_coretune import CoreTuningTask
from timm_coretune.data.class_balance import ClassBalancedBatchSampler
from timm_coretune.data.resumable import make_resumable
from timm_coretune.train.loop import Trainer
from timm_coretune.train.loop_config import LoopConfig
from timm_coretune.train.run.place import place_in_epoch
from timm_coretune.train.run.resume import Continuation
from timm_coretune.train.watching.record import Record

NUM_IMAGES, NUM_CLASSES, GLOBAL_BATCH = 43, 3, 8


class Images(Dataset):
    """Pictures with noise that is drawn anew in each epoch, as by augmentation. The first pixel is the index."""

    def __init__(self, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(5)
        self.images = torch.randn(NUM_IMAGES, 3, 32, 32, generator=generator, dtype=torch.float64).to(dtype)

    def __len__(self) -> int:
        return NUM_IMAGES

    def __getitem__(self, index: int) -> tuple:
        image = self.images[index] + 0.1 * torch.rand((), dtype=torch.float64).to(self.images.dtype)
        image[0, 0, 0] = index
        return image, index % NUM_CLASSES


class Stop(Exception):
    """The part of this process group is over."""


class StateAt(Record):
    """Keeps the state at one update and ends the part there."""

    def __init__(self, until: tuple):
        self.until, self.state = until, None

    def save_recovery(self, trainer: Trainer, epoch: int, update: int) -> None:
        if (epoch, update + 1) != self.until:
            return
        task = trainer.task
        self.state = dict(
            model=task.get_eval_model().state_dict(),
            task=task.get_task_state(),
            optimizer=trainer.optimizer.state_dict(),
            loop=trainer.state_dict(),
        )
        raise Stop


def sampler_of(dataset: Dataset, balanced: bool, rank: int, world: int) -> object:
    size = GLOBAL_BATCH // world
    if balanced:
        labels = [index % NUM_CLASSES for index in range(NUM_IMAGES)]
        return ClassBalancedBatchSampler(labels, size, rank, world, 42)
    order = RandomSampler(dataset) if world == 1 else DistributedSampler(dataset, world, rank)
    return BatchSampler(order, size, True)


def train_part(accelerator: Accelerator, job: dict, dtype: torch.dtype, balanced: bool, state: Any) -> dict:
    """Train one of the runs until the place of the job, from a state if there is one."""
    rank, world = accelerator.process_index, accelerator.num_processes
    torch.manual_seed(0)
    model = create_model('test_vit', num_classes=NUM_CLASSES, img_size=32).to(dtype)
    task = CoreTuningTask(model, dtype=dtype, generator=torch.Generator().manual_seed(1), verbose=False)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.05, momentum=0.9)
    dataset = Images(dtype)
    loader = DataLoader(dataset, batch_sampler=sampler_of(dataset, balanced, rank, world))
    loader = make_resumable(loader, 42, rank, world)
    continuation = Continuation(None)
    if state is not None:
        task.get_eval_model().load_state_dict(state['model'])
        task.load_task_state(state['task'])
        optimizer.load_state_dict(state['optimizer'])
        before = dict(batch_size=GLOBAL_BATCH // job['before'], grad_accum_steps=1)
        place = state['loop']
        continuation = Continuation('x', place['epoch'], place['batch'], loop_state=place, before=before)
        values = dict(batch_size=GLOBAL_BATCH // world, grad_accum_steps=1)
        continuation = place_in_epoch(continuation, values | dict.fromkeys(job['order']), world, loader)
    record = StateAt(job['until'])
    config = LoopConfig(recovery_interval=1, log_interval=1000)
    trainer = Trainer(task, optimizer, accelerator, config=config, record=record)
    if continuation.loop_state:
        trainer.load_state_dict(continuation.loop_state)
    seen, forward = [], task.forward

    def noting(input: torch.Tensor, target: torch.Tensor) -> dict:
        shares = gather_object([input.detach().clone()])
        seen.append(torch.stack(shares, dim=1).flatten(0, 1))  # as one process reads them
        return forward(input, target)

    task.forward = noting
    results = []
    with contextlib.suppress(Stop):
        results = trainer.fit(loader, None, range(continuation.epoch, 3), continuation.batch)
    losses = [result['train']['loss'] for result in results]
    weights = {k: v.detach().clone() for k, v in task.get_eval_model().state_dict().items()}
    return dict(seen=seen, state=record.state, weights=weights, losses=losses)


def main(rank: int, directory: Path) -> None:
    job = torch.load(directory / 'job.pt', weights_only=False)
    world = job['num_processes']
    if world > 1:
        join_ranks(rank, world, directory)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR='127.0.0.1')
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    save_found(
        {run: train_part(accelerator, job, *run, state) for run, state in job['states'].items()}, rank, directory
    )


if __name__ == '__main__':
    main(int(sys.argv[1]), Path(sys.argv[2]))
