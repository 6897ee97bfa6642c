"""One process of tests/segmentation/test_task.py: updates of every scenario in DistributedDataParallel over gloo

Run as `segmentation_task_worker.py RANK DIRECTORY` for each rank; what it found is written to DIRECTORY.
"""

import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Tuple

import torch
import torch.distributed as dist
import torch.nn as nn
from ranks import join_ranks, save_found

from timm_coretune.segmentation import SegmentationTask, create_segmentation_model

WORLD_SIZE, NUM_CLASSES, NUM_UPDATES, IGNORED = 2, 4, 3, 255


class Scenario(NamedTuple):
    """Sizes of the local batches in rank order, which images are ignored as a whole, arguments of the task."""

    sizes: Tuple[int, int] = (2, 2)
    ignored: Tuple[int, ...] = ()
    kwargs: Dict[str, Any] = {}
    mixup_enabled: bool = True
    head: str = 'fcn'


SCENARIOS: Dict[str, Scenario] = {
    'two images each': Scenario(),
    'an ignored image in one process': Scenario(ignored=(1,)),
    'one process of ignored images': Scenario(ignored=(2, 3)),
    'all ignored': Scenario(ignored=(0, 1, 2, 3)),
    'two images and one': Scenario((2, 1), kwargs={'uneven_batches': True}),
    'one image and three': Scenario((1, 3), ignored=(2,), kwargs={'uneven_batches': True, 'label_smoothing': 0.1}),
    'no mixtures': Scenario(mixup_enabled=False),
    'linear': Scenario(head='linear'),
    'eomt': Scenario(head='eomt'),
    'no contrast': Scenario(kwargs={'contrast_weight': 0.0}),
}


def make_task(scenario: Scenario) -> SegmentationTask:
    """Without BatchNorm's statistics of a batch and without dropout, by which images depend on their process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_segmentation_model('test_vit', NUM_CLASSES, scenario.head, (32, 32)).double()
        kwargs = {'contrast_weight': 1.0, 'temperature': 0.2, 'projection_dim': 8, **scenario.kwargs}
        generator = torch.Generator().manual_seed(1)
        task = SegmentationTask(
            model, anchors_per_image=3, dtype=torch.float64, verbose=False, generator=generator, **kwargs
        )
    task.criterion.mixup.mixup_enabled = scenario.mixup_enabled
    task.train()
    for module in task.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.Dropout)):
            module.eval()
    return task


def all_images(scenario: Scenario) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
    """Images and masks of all ranks in rank order, for every update."""
    generator = torch.Generator().manual_seed(2)
    num_images = sum(scenario.sizes)
    for _ in range(NUM_UPDATES):
        images = torch.randn(num_images, 3, 32, 32, dtype=torch.float64, generator=generator)
        target = torch.randint(NUM_CLASSES, (num_images, 32, 32), generator=generator)
        target[torch.rand(target.shape, generator=generator) < 0.2] = IGNORED
        target[list(scenario.ignored)] = IGNORED
        yield images, target


def gradients(module: nn.Module) -> Dict[str, torch.Tensor]:
    """Of every parameter that trains, copied."""
    named = module.named_parameters()
    return {name.removeprefix('module.'): p.grad.clone() for name, p in named if p.requires_grad}


def step(module: nn.Module, optimizer: torch.optim.Optimizer, *args) -> Dict[str, Any]:
    """An update by a task, or by its module, called with args: the losses and the gradients."""
    optimizer.zero_grad()
    losses = module(*args)
    losses['loss'].backward()
    found = {
        'losses': {name: loss.item() for name, loss in losses.items() if name != 'output'},
        'gradients': gradients(getattr(module, 'trainable_module', module)),
    }
    optimizer.step()
    return found


def run(scenario: Scenario, rank: int) -> List[Dict[str, Any]]:
    task = make_task(scenario).prepare_distributed(find_unused_parameters=False)
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.05)
    own = [[x.split(list(scenario.sizes))[rank] for x in batch] for batch in all_images(scenario)]
    return [{**step(task, optimizer, *batch), 'generator': task.criterion.mixup.generator.get_state()} for batch in own]


def main(rank: str, directory: str) -> None:
    torch.set_num_threads(1)
    join_ranks(int(rank), WORLD_SIZE, Path(directory))
    save_found({name: run(scenario, int(rank)) for name, scenario in SCENARIOS.items()}, int(rank), Path(directory))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == '__main__':
    main(*sys.argv[1:])
