"""One process of tests/loss/test_methods.py: trains with every method on its share of the batches

Run as `methods_worker.py RANK DIRECTORY`, in two processes.
"""

import sys
from pathlib import Path

import torch
from method_runs import batches, create_run
from ranks import join_ranks, save_found

from timm_coretune.loss import METHODS

WORLD_SIZE = 2


def train(method, rank=0, num_processes=1, **kwargs):
    """Losses of every update, and the state after the last one, in float64."""
    run = create_run(method, dtype=torch.float64, **kwargs)
    losses = [run.update(batch) for batch in batches(rank, num_processes, torch.float64)]
    return {'losses': losses, 'state': run.state()}


def main(rank, directory):
    torch.set_num_threads(1)
    join_ranks(rank, WORLD_SIZE, directory)
    found = {
        method: train(method, rank, WORLD_SIZE, prepare=lambda task: task.prepare_distributed()) for method in METHODS
    }
    save_found(found, rank, directory)
    torch.distributed.destroy_process_group()


if __name__ == '__main__':
    main(int(sys.argv[1]), Path(sys.argv[2]))
