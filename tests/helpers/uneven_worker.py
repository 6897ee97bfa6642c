"""One process of tests/train/test_processes.py: trains on as many batches as its second argument says, prints losses

Run as `uneven_worker.py RANK NUM_BATCHES PORT`.
"""

import os
import sys

import timm
import torch
from accelerate import Accelerator

from timm_coretune import CoreTuningTask
from timm_coretune.train import Trainer


def main(rank: str, num_batches: str, port: str) -> None:
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    task = CoreTuningTask(timm.create_model('test_vit', num_classes=2, img_size=32), verbose=False)
    trainer = Trainer(task, torch.optim.SGD(task.parameters(), lr=0.01), accelerator)
    loader = [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 0, 1])) for _ in range(int(num_batches))]
    metrics = trainer.train_one_epoch(0, loader)
    print('trained', trainer.meter.num_steps, metrics['loss'])
    accelerator.end_training()


if __name__ == '__main__':
    main(*sys.argv[1:])
