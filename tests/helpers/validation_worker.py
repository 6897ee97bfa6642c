"""One process of tests/train/test_validation.py: validates 41 sorted images by several loaders, and saves the scores

Run as `validation_worker.py RANK FOLDER`. Two processes are expected.
"""

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from ranks import join_ranks, save_found
from timm.data import create_loader
from timm.task import ClassificationTask
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from timm_coretune.evaluation.classification import ClassificationEvaluator
from timm_coretune.train import Trainer


class Images(TensorDataset):
    transform = None


def sorted_images() -> Images:
    """41 images of 4 classes, class by class, whose first 4 pixels are the logits of a model with random errors."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(41) * 4 // 41
    images = torch.randn(41, 1, 2, 2, generator=generator)
    images.view(41, 4)[torch.arange(41), labels] += 0.3 * labels
    return Images(images, labels)


def main(rank: int, directory: Path) -> None:
    join_ranks(rank, 2, directory)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1')
    images = sorted_images()

    def prepared(batch_size: int = 5, **kwargs: bool) -> DataLoader:
        accelerator.dataloader_config = DataLoaderConfiguration(**kwargs)
        return accelerator.prepare(DataLoader(images, batch_size))

    accelerator = Accelerator(cpu=True)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 4))
    torch.nn.init.eye_(model[1].weight)
    torch.nn.init.zeros_(model[1].bias)
    task = ClassificationTask(model, torch.nn.CrossEntropyLoss(), verbose=False)
    evaluator = ClassificationEvaluator(metrics=['confusion', 'per-class', 'ece'], num_classes=4)
    trainer = Trainer(task, torch.optim.SGD(model.parameters(), lr=0.1), accelerator, evaluator=evaluator)
    loaders = {
        'plain': DataLoader(images, 5),
        'shuffled': DataLoader(images, 5, shuffle=True),
        'distributed': DataLoader(images, 5, sampler=DistributedSampler(images, 2, rank, shuffle=False)),
        'prepared': prepared(),
        'prepared-and-split': prepared(6, split_batches=True),
        'prepared-and-dispatched': prepared(dispatch_batches=True),
        'timm': create_loader(
            images, (1, 2, 2), 5, distributed=True, num_workers=0, device=torch.device('cpu'), use_prefetcher=False,
            persistent_workers=False,
        ),
    }  # fmt: skip
    found = {}
    for name, loader in loaders.items():
        scores = trainer.validator.validate(loader)
        found[name] = (scores, evaluator.matrix.tolist())
    save_found(found, rank, directory)


if __name__ == '__main__':
    main(int(sys.argv[1]), Path(sys.argv[2]))
