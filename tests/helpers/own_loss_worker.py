"""One process of tests/loss/test_base.py: trains with a loss of its own on its share of the batches

Run as `own_loss_worker.py RANK DIRECTORY`. How many processes there are is in DIRECTORY/port, behind the port.
"""

import os
import sys
from pathlib import Path

import timm
import torch
from accelerate import Accelerator
from own_loss import MovingMeanLoss
from ranks import save_found
from timm.utils import unwrap_model

from timm_coretune import CoreTuningTask
from timm_coretune.train import LoopConfig, Trainer

NUM_CLASSES, NUM_UPDATES, BATCH_SIZE = 3, 5, 8


def create_trainer(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model('test_vit', num_classes=NUM_CLASSES, img_size=32)
    criterion = MovingMeanLoss(model.num_features, NUM_CLASSES, generator=torch.Generator().manual_seed(seed))
    task = CoreTuningTask(model, criterion, verbose=False)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.05, momentum=0.9)
    return Trainer(task, optimizer, Accelerator(cpu=True), config=LoopConfig(log_interval=1))


def batches(rank=0, num_processes=1):
    """Image b of process r is image b * num_processes + r of a single process."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(NUM_UPDATES):
        images = torch.randn(BATCH_SIZE, 3, 32, 32, generator=generator)
        target = torch.randint(NUM_CLASSES, (BATCH_SIZE,), generator=generator)
        yield images[rank::num_processes], target[rank::num_processes]


def found_by(trainer, losses):
    module = unwrap_model(trainer.task.trainable_module)
    return {'losses': dict(losses), 'state': {k: v.clone() for k, v in module.state_dict().items()}}


def main(rank, directory):
    port, num_processes = (Path(directory) / 'port').read_text().split()
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=num_processes, MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    torch.set_num_threads(1)
    trainer = create_trainer()
    losses = trainer.train_one_epoch(0, list(batches(int(rank), int(num_processes))))
    save_found(found_by(trainer, losses), int(rank), Path(directory))
    trainer.accelerator.end_training()


if __name__ == '__main__':
    main(*sys.argv[1:])
