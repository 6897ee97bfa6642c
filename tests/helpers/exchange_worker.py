"""A process that counts what a step exchanges with the others, by the calls of torch.distributed in Python.

DistributedDataParallel exchanges gradients below Python; its calls are not among them.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any, Dict

import timm
import torch
import torch.distributed as dist
from ranks import join_ranks, save_found

from timm_coretune import CoreTuningTask, SegmentationTask, create_segmentation_model

WORLD_SIZE, BATCH, CLASSES, IMG_SIZE = 2, 4, 7, 32
METHODS = {
    'core': {},
    'core, smooth none': dict(smooth='none'),
    'core, no mixtures in the contrast': dict(mixtures='none'),
    'core, no mixtures at all': dict(smooth='none', mixtures='none'),
    'core, no contrast': dict(contrast_weight=0.0),
    'scl': {},
    'bcl': {},
    'segmentation': {},
}
CALLS = (
    *('all_gather', 'all_gather_into_tensor', 'all_gather_single', 'all_gather_object', 'gather'),
    *('all_reduce', 'reduce', 'reduce_scatter', 'reduce_scatter_tensor', 'reduce_scatter_single'),
    *('broadcast', 'scatter'),
)


def count_calls() -> Counter:
    """Count the calls of each collective from here on, and the bytes that this process gives to them."""
    counts: Counter = Counter()
    for name in filter(lambda name: hasattr(dist, name), CALLS):
        call = getattr(dist, name)

        def counted(*args: Any, _call: Any = call, **kwargs: Any) -> Any:
            given = args[-1]  # of a gather the rows of this process, of all_reduce the tensor
            counts['calls'] += 1
            counts['bytes'] += given.numel() * given.element_size()
            return _call(*args, **kwargs)

        setattr(dist, name, counted)
    return counts


def step(name: str, counts: Counter) -> Dict[str, Any]:
    torch.manual_seed(0)
    images = torch.randn(BATCH, 3, IMG_SIZE, IMG_SIZE)
    if name == 'segmentation':
        model = create_segmentation_model('test_resnet', CLASSES, output_stride=8)
        task: Any = SegmentationTask(model, anchors_per_image=3, projection_dim=16, verbose=False)
        target = torch.randint(CLASSES, (BATCH, IMG_SIZE, IMG_SIZE))
    else:
        model = timm.create_model('test_resnet', num_classes=CLASSES)
        task = CoreTuningTask(model, name.split(',')[0], projection_dim=16, verbose=False, **METHODS[name])
        target = torch.arange(BATCH) % 2
    task = task.prepare_distributed()
    counts.clear()
    loss = task(images, target)['loss']
    forward = dict(counts)
    counts.clear()
    loss.backward()
    return {'forward': forward, 'backward': dict(counts), 'width': task.criterion.num_features}


def main(rank: int, directory: Path) -> None:
    torch.set_num_threads(1)
    join_ranks(rank, WORLD_SIZE, directory)
    counts = count_calls()
    save_found({name: step(name, counts) for name in METHODS}, rank, directory)
    dist.destroy_process_group()


if __name__ == '__main__':
    main(int(sys.argv[1]), Path(sys.argv[2]))
