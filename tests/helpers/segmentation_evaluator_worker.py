"""One process of tests/evaluation/test_segmentation.py: evaluates its share of the batches, then saves what it computed

Run as `segmentation_evaluator_worker.py RANK DIRECTORY`.
"""

import sys
from pathlib import Path
from typing import Iterator, Tuple

import torch
import torch.distributed as dist
from ranks import join_ranks, save_found

from timm_coretune.evaluation.segmentation import SegmentationEvaluator

NUM_CLASSES = 6
IGNORED = 255


def batches() -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
    """Three batches of different sizes: class 4 is predicted but in no target, class 5 is in neither."""
    generator = torch.Generator().manual_seed(0)
    for size in (3, 1, 2):
        target = torch.randint(4, (size, 7, 5), generator=generator)
        output = torch.randn(size, NUM_CLASSES, 7, 5, generator=generator)
        output.scatter_add_(1, target[:, None], torch.full((size, 1, 7, 5), 1.5))
        output[:, 5] -= 100
        target[torch.rand(size, 7, 5, generator=generator) < 0.2] = IGNORED
        yield output, target


def main(rank: str, directory: str) -> None:
    torch.set_num_threads(1)
    join_ranks(int(rank), 2, Path(directory))
    evaluator = SegmentationEvaluator(NUM_CLASSES)
    for index, (output, target) in enumerate(batches()):
        if (index == 2) == (rank == '1'):  # two batches and one
            evaluator.update(output, target)
    found = {'metrics': dict(evaluator.compute()), 'matrix': evaluator.matrix.tolist()}
    save_found(found, int(rank), Path(directory))
    dist.destroy_process_group()


if __name__ == '__main__':
    main(*sys.argv[1:])
