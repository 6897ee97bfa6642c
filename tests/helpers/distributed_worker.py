"""One process of tests/test_distributed.py: a step of every scenario in DistributedDataParallel over gloo, in float64

Run as `distributed_worker.py RANK DIRECTORY` for each rank; what it found is written to DIRECTORY.
"""

import sys
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
import torch.distributed as dist
import torch.nn as nn
from ranks import join_ranks, save_found

import timm_coretune.distributed
from timm_coretune import CoreTuningLoss, CoreTuningTask

WIDTH, NUM_CLASSES = 5, 4


class Scenario(NamedTuple):
    """Sizes of the local batches in rank order, class indices of the global batch, arguments of the loss.

    sum_over_ranks False is the negative control: the backward of the gather forgets what other ranks did with the rows.
    With mlp the classifier is one, which mixtures must be classified by.
    """

    sizes: Tuple[int, ...]
    label: Tuple[int, ...]
    loss_kwargs: Dict[str, Any] = {}
    soft: bool = False
    mixup_enabled: bool = True
    sum_over_ranks: bool = True
    mlp: bool = False


MIXED = (0, 1, 0, 2, 1, 3, 0, 0, 1, 2, 2, 1)

SCENARIOS: Dict[str, Scenario] = {
    'equal batches': Scenario((4, 4), MIXED[:8]),
    'equal batches, sizes exchanged': Scenario((4, 4), MIXED[:8], {'uneven_batches': True}),
    'soft targets': Scenario((4, 4), MIXED[:8], soft=True),
    'label smoothing': Scenario((4, 4), MIXED[:8], {'label_smoothing': 0.1}),
    'no contrast': Scenario((4, 4), MIXED[:8], {'contrast_weight': 0.0}),
    'no mixtures': Scenario((4, 4), MIXED[:8], mixup_enabled=False),
    'negatives smooth': Scenario((4, 4), MIXED[:8], {'smooth': 'negative', 'smooth_weight': 0.3}),
    'positives of two': Scenario((5, 3), MIXED[:8], {'uneven_batches': True, 'positive_candidates': 2}),
    'nothing mixed': Scenario((4, 4), MIXED[:8], {'smooth': 'none', 'mixtures': 'none'}, mixup_enabled=False),
    'five and three': Scenario((5, 3), MIXED[:8], {'uneven_batches': True}),
    'three and five, soft targets': Scenario((3, 5), MIXED[:8], {'uneven_batches': True}, soft=True),
    'seven and one': Scenario((7, 1), MIXED[:8], {'uneven_batches': True}),
    'eight and none': Scenario((8, 0), MIXED[:8], {'uneven_batches': True}),
    'five and three, no mixtures': Scenario((5, 3), MIXED[:8], {'uneven_batches': True}, mixup_enabled=False),
    'classifier of two layers': Scenario((4, 4), MIXED[:8], mlp=True),
    'classifier of two layers, five and three': Scenario((5, 3), MIXED[:8], {'uneven_batches': True}, mlp=True),
    'classifier of two layers, eight and none': Scenario((8, 0), MIXED[:8], {'uneven_batches': True}, mlp=True),
    'classifier of two layers, one class in all': Scenario((4, 4), (2,) * 8, mlp=True),
    'one image each': Scenario((1, 1), (0, 1)),
    'one rank of one class': Scenario((4, 4), (2, 2, 2, 2, 0, 1, 3, 1)),
    'every rank of one class': Scenario((4, 4), (2, 2, 2, 2, 1, 1, 1, 1)),
    'one class in all': Scenario((4, 4), (2,) * 8),
    'one class in all, five and three': Scenario((5, 3), (2,) * 8, {'uneven_batches': True}),
    'not gathered': Scenario((4, 4), MIXED[:8], {'gather': False}),
    'not gathered, one rank of one class': Scenario((4, 4), (2, 2, 2, 2, 0, 1, 3, 1), {'gather': False}),
    'without the sum over ranks': Scenario((4, 4), MIXED[:8], sum_over_ranks=False),
    'three ranks': Scenario((4, 4, 4), MIXED),
    'three ranks, four and one and three': Scenario((4, 1, 3), MIXED[:8], {'uneven_batches': True}),
    'three ranks, without the sum over ranks': Scenario((4, 4, 4), MIXED, sum_over_ranks=False),
}

WORLD_SIZES = sorted({len(scenario.sizes) for scenario in SCENARIOS.values()}, reverse=True)


class TinyModel(nn.Module):
    """What a task needs of a timm classifier."""

    def __init__(self, mlp: bool = False):
        super().__init__()
        self.num_classes, self.num_features = NUM_CLASSES, WIDTH
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, NUM_CLASSES)
        if mlp:
            self.head = nn.Sequential(nn.Linear(WIDTH, 7), nn.Tanh(), nn.Linear(7, NUM_CLASSES))

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.stem(x).tanh()

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def make_task(scenario: Scenario) -> CoreTuningTask:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        criterion = CoreTuningLoss(
            WIDTH,
            **{'contrast_weight': 1.0, 'temperature': 0.2, **scenario.loss_kwargs},
            projection_dim=3,
            generator=torch.Generator().manual_seed(1),
        )
        model = TinyModel(scenario.mlp).double()
    task = CoreTuningTask(model, criterion, device=torch.device('cpu'), dtype=torch.float64, verbose=False)
    task.criterion.mixup.mixup_enabled = scenario.mixup_enabled
    return task.train()


def global_batch(scenario: Scenario) -> Tuple[torch.Tensor, torch.Tensor]:
    """Images and targets of all ranks, in rank order."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(len(scenario.label), WIDTH, dtype=torch.float64, generator=generator)
    target = torch.tensor(scenario.label)
    if scenario.soft:
        noise = torch.randn(len(target), NUM_CLASSES, dtype=torch.float64, generator=generator)
        target = (noise + 2 * nn.functional.one_hot(target, NUM_CLASSES)).softmax(dim=1)
    return images, target


def forget_other_ranks(ctx, *grads: Optional[torch.Tensor]) -> Tuple[Optional[torch.Tensor], ...]:
    world_size, rank = dist.get_world_size(), dist.get_rank()
    return tuple(None if grad is None else grad.chunk(world_size)[rank] for grad in grads)


def hessian_product(task: CoreTuningTask, *arguments: Any) -> Dict[str, torch.Tensor]:
    """What this process adds to the product of the Hessian and a vector, which is the mean of what all add."""
    named = dict(task.trainable_module.named_parameters())
    generator = torch.Generator().manual_seed(3)
    vectors = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in named.values()]
    loss = task.trainable_module(*arguments)['loss']
    grads = torch.autograd.grad(loss, list(named.values()), create_graph=True)
    product = sum((grad * vector).sum() for grad, vector in zip(grads, vectors, strict=True))
    return dict(zip(named, torch.autograd.grad(product, list(named.values())), strict=True))


def gradients(task: CoreTuningTask) -> Dict[str, torch.Tensor]:
    return {name.removeprefix('module.'): p.grad for name, p in task.trainable_module.named_parameters()}


def mean_hessian_product(scenario: Scenario, images: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
    task = make_task(scenario)  # not in DistributedDataParallel, which does not keep the graph of the gradients
    product = hessian_product(task, images, target, *task.criterion.prepare(len(images), target.device))
    for value in product.values():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return product


def run(scenario: Scenario, rank: int) -> Dict[str, Any]:
    task = make_task(scenario).prepare_distributed()
    images, target = (x.split(list(scenario.sizes))[rank] for x in global_batch(scenario))
    backward = timm_coretune.distributed._AllGather.backward
    if not scenario.sum_over_ranks:
        timm_coretune.distributed._AllGather.backward = staticmethod(forget_other_ranks)
    try:
        losses = task(images, target)
        losses['loss'].backward()
    finally:
        timm_coretune.distributed._AllGather.backward = staticmethod(backward)
    losses.pop('output')
    return {
        'losses': {name: loss.item() for name, loss in losses.items()},
        'gradients': gradients(task),
        'generator': task.criterion.mixup.generator.get_state(),
        **({'product': mean_hessian_product(scenario, images, target)} if scenario.sum_over_ranks else {}),
    }


def main(arguments: List[str]) -> None:
    rank, directory = int(arguments[0]), Path(arguments[1])
    torch.set_num_threads(1)
    found = {}
    for world_size in WORLD_SIZES:  # starting a process costs far more than its steps: all group sizes share them
        if rank >= world_size:
            continue
        join_ranks(rank, world_size, directory)
        found.update({name: run(s, rank) for name, s in SCENARIOS.items() if len(s.sizes) == world_size})
        dist.barrier()
        dist.destroy_process_group()
    save_found(found, rank, directory)


if __name__ == '__main__':
    main(sys.argv[1:])
