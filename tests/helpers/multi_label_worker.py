"""One process of tests/loss/test_multi_label.py: losses, gradients and scores of its share of a batch

Run as `multi_label_worker.py RANK DIRECTORY`, in two processes.
"""

import sys
from pathlib import Path

import timm
import torch
from ranks import join_ranks, save_found

from timm_coretune import CoreTuningTask
from timm_coretune.evaluation.multi_label import MultiLabelEvaluator

WORLD_SIZE, SIZE, CLASSES = 2, 12, 5
METHODS = ('core', 'scl', 'l2-sp')
# in 'mixed' the images of process 0 share a label with all others, those of process 1 do not
CASES = ('random', 'mixed')


def batch(case):
    """Images and multi-hot targets of all processes together."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(SIZE, 3, 32, 32, generator=generator, dtype=torch.float64)
    target = (torch.rand(SIZE, CLASSES, generator=generator) < 0.3).double()
    if case == 'mixed':
        target[::2] = 1
        target[1::2] = torch.eye(CLASSES, dtype=torch.float64)[[0, 1, 2, 3, 4, 0]]
    return images, target


def step(method, case, rank=0, num_processes=1):
    """Losses of one step and the gradients after it. Images are dealt out in turn."""
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=CLASSES).double()
    kwargs = dict(projection_dim=8) if method in ('core', 'scl') else {}
    task = CoreTuningTask(
        model,
        method,
        dtype=torch.float64,
        verbose=False,
        multi_label=True,
        generator=torch.Generator().manual_seed(1),
        **kwargs,
    )
    if num_processes > 1:
        task.prepare_distributed()
    images, target = batch(case)
    task.trainable_module.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()  # the statistics of a batch are those of a process
    result = task(images[rank::num_processes], target[rank::num_processes])
    result['loss'].backward()
    gradients = torch.cat([p.grad.flatten() for p in task.trainable_module.parameters() if p.grad is not None])
    return {'losses': {k: v.detach() for k, v in result.items() if 'loss' in k}, 'gradients': gradients}


def scores(rank=0, num_processes=1):
    """Scores of random outputs, of which process 1 has fewer, and the table of the classes."""
    generator = torch.Generator().manual_seed(3)
    output, target = torch.randn(31, CLASSES, generator=generator), torch.rand(31, CLASSES, generator=generator) < 0.4
    evaluator = MultiLabelEvaluator(metrics=['per-class'], num_classes=CLASSES)
    for part in range(rank, 31, num_processes):
        evaluator.update(output[part : part + 1], target[part : part + 1].float())
    return evaluator.compute(), evaluator.per_class()


def main(rank, directory):
    torch.set_num_threads(1)
    join_ranks(rank, WORLD_SIZE, directory)
    found = {(method, case): step(method, case, rank, WORLD_SIZE) for method in METHODS for case in CASES}
    save_found({**found, 'scores': scores(rank, WORLD_SIZE)}, rank, directory)
    torch.distributed.destroy_process_group()


if __name__ == '__main__':
    main(int(sys.argv[1]), Path(sys.argv[2]))
