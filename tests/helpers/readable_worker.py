"""One process of tests/train/data/test_readable.py: opens images of which some cannot be read, and saves what is left

Run as `readable_worker.py RANK DIRECTORY`. The images are in DIRECTORY/data.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import join_ranks, save_found

from timm_coretune.train.cli.arguments import parse_args
from timm_coretune.train.data import readable
from timm_coretune.train.data.datasets import create_datasets


def main(rank: str, directory: str) -> None:
    torch.set_num_threads(1)
    join_ranks(int(rank), 2, Path(directory))
    looked_at = []
    original = readable._Files.fault

    def fault(files: readable._Files, index: int, whole: bool) -> str:
        looked_at.append(index)
        return original(files, index, whole)

    readable._Files.fault = fault
    flags = ['--data-dir', f'{directory}/data', '--val-split=']
    dataset = create_datasets(parse_args(flags).settings.data).train
    save_found({'left': dataset.indices, 'looked_at': sorted(looked_at)}, int(rank), Path(directory))
    dist.destroy_process_group()


if __name__ == '__main__':
    main(*sys.argv[1:])
