"""One process of tests/test_cached_step.py: cached steps in DistributedDataParallel over gloo, in float64

Run as `cached_step_worker.py RANK DIRECTORY` for each rank; what it found is written to DIRECTORY.
"""

import sys
from pathlib import Path
from typing import Any, Dict, List

import torch
import torch.distributed as dist
from cached_steps import SCENARIOS, backward_in_one_graph, batch, buffers, gradients, make_task
from ranks import join_ranks, save_found

from timm_coretune import CachedStep

WORLD_SIZE = 2
# images of each process
SIZES = {'even': (6, 6), 'uneven': (7, 5)}


def share(rank: int, sizes, seed: int):
    return tuple(x.split(list(sizes))[rank] for x in batch(seed))


def averaged(task) -> Dict[str, Any]:
    """Gradients averaged over processes, one after the other."""
    found = gradients(task)
    for name, gradient in found.items():
        if gradient is not None:
            dist.all_reduce(gradient)
            found[name] = gradient / WORLD_SIZE
    return found


def run(name: str, rank: int, sizes: str = 'even', accumulated: int = 1, **ddp_kwargs: Any) -> Dict[str, Any]:
    """Two updates by cached steps, and the same in one graph without DistributedDataParallel."""
    scenario, kwargs = SCENARIOS[name], {'uneven_batches': sizes == 'uneven'}
    task = make_task(scenario, **kwargs).prepare_distributed(**ddp_kwargs)
    reference = make_task(scenario, **kwargs)
    step, found = CachedStep(task, chunk_size=2), []
    for update in range(2):
        batches = [share(rank, SIZES[sizes], seed=2 * update + i) for i in range(accumulated)]
        torch.manual_seed(10 * update + rank)
        for images, target in batches[:-1]:
            with task.no_sync():
                step(images, target)
        losses = step(*batches[-1])
        torch.manual_seed(10 * update + rank)
        for images, target in batches:
            expected = backward_in_one_graph(reference, images.split(2), target)
        found.append(
            {
                'losses': losses,
                'expected losses': expected,
                'gradients': gradients(task),
                'expected gradients': averaged(reference),
                'buffers': buffers(task),
                'expected buffers': buffers(reference),
            }
        )
        task.trainable_module.zero_grad()
        reference.trainable_module.zero_grad()
        for x in reference.trainable_module.buffers():  # as DistributedDataParallel does before the next step
            dist.broadcast(x, 0)
    return found


def main(arguments: List[str]) -> None:
    rank, directory = int(arguments[0]), Path(arguments[1])
    torch.set_num_threads(1)
    join_ranks(rank, WORLD_SIZE, directory)
    found = {name: run(name, rank) for name in ('vit', 'resnet', 'classifier of two layers')}
    found['uneven'] = run('vit', rank, 'uneven')
    found['accumulated'] = run('vit, drop path and dropout', rank, accumulated=2, gradient_as_bucket_view=True)
    found['unused parameters are looked for'] = run('no contrast', rank, find_unused_parameters=True)
    dist.destroy_process_group()
    save_found(found, rank, directory)


if __name__ == '__main__':
    main(sys.argv[1:])
