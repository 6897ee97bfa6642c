#!/usr/bin/env python3
"""What does Core-tuning cost a training step?

    python benchmarks/step.py

prints one Markdown table of ratios. Each is the median over alternating pairs of runs in one process, so that a machine
that slows down slows both sides. On a CPU the seconds are those of the processor, of all threads, which other programs
disturb least; the ratio of wall times stands beside. Four questions:
- A whole training step (forward, backward, update) with Core-tuning against one with cross-entropy.
- The same of a segmentation, DeepLab-V3 on a dilated resnet50, and the most memory each takes in its own process.
- The criterion alone (mining, mixing, projection head, losses, forward and backward; the classifier included) against a
  transcription of the formulas that projects and classifies the 3B mixed rows. Both must give the same loss.
- Mining and contrastive loss with 32,000 classes against 10.

    python benchmarks/step.py --methods

prints instead what each method of `train.py --method` costs: a whole training step of a resnet18 at 64 px against one
with cross-entropy, and the memory of what the method keeps beside the model (projector, copies, banks).
"""

import argparse
import multiprocessing
import os
import platform
import resource
import statistics
import time
from typing import Callable, List, NamedTuple, Optional, Tuple

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.task import ClassificationTask

from timm_coretune import CoreTuningLoss, CoreTuningTask, SegmentationTask, create_segmentation_model
from timm_coretune.loss import METHODS
from timm_coretune.mixup import MixupDraws
from timm_coretune.segmentation.dense import DenseCrossEntropy


class Timing(NamedTuple):
    """Median seconds of two things, and the medians of the ratios of seconds and of wall times."""

    first: float
    second: float
    ratio: float
    wall_ratio: float


def time_pairs(first: Callable, second: Callable, num_pairs: int, device: torch.device) -> Timing:
    """Time alternating runs: CPU seconds of all threads on a CPU, else wall time.

    A run that is timed follows one of the same kind that is not: memory is then laid out as in a loop of its own.
    """
    clock = time.process_time if device.type == 'cpu' else time.perf_counter

    def seconds(run: Callable) -> Tuple[float, float]:
        run()
        if device.type == 'cuda':
            torch.cuda.synchronize()
        start, wall = clock(), time.perf_counter()
        run()
        if device.type == 'cuda':
            torch.cuda.synchronize()
        return clock() - start, time.perf_counter() - wall

    for run in (first, second) * 2:
        seconds(run)
    times: List[Tuple[Tuple[float, float], Tuple[float, float]]] = []
    for index in range(num_pairs):
        # the order changes too, as the second of two may find warmer caches
        if index % 2:
            b = seconds(second)
            times.append((seconds(first), b))
        else:
            times.append((seconds(first), seconds(second)))
    return Timing(
        statistics.median(a for (a, _), _ in times),
        statistics.median(b for _, (b, _) in times),
        statistics.median(a / b for (a, _), (b, _) in times),
        statistics.median(a / b for (_, a), (_, b) in times),
    )


def make_step(task_type: type, model_name: str, batch_size: int, device: torch.device, amp: bool) -> Callable:
    """A training step of a timm model at 224 px with 100 classes."""
    torch.manual_seed(0)
    model = timm.create_model(model_name, num_classes=100).to(device)
    kwargs = {} if task_type is CoreTuningTask else {'criterion': nn.CrossEntropyLoss()}
    task = task_type(model, device=device, verbose=False, **kwargs)
    input = torch.randn(batch_size, 3, 224, 224, device=device)
    return repeat_step(task, input, torch.randint(100, (batch_size,), device=device), amp)


def make_dense_step(task_type: type, batch_size: int, device: torch.device, amp: bool) -> Callable:
    """A training step of DeepLab-V3 on a resnet50 of stride 8 at 256 px with 21 classes."""
    torch.manual_seed(0)
    model = create_segmentation_model('resnet50', 21, img_size=(256, 256), output_stride=8).to(device)
    kwargs = {} if task_type is SegmentationTask else {'criterion': DenseCrossEntropy()}
    task = task_type(model, device=device, verbose=False, **kwargs)
    input = torch.randn(batch_size, 3, 256, 256, device=device)
    # regions, as masks have them
    target = torch.randint(21, (batch_size, 8, 8), device=device).repeat_interleave(32, 1).repeat_interleave(32, 2)
    return repeat_step(task, input, target, amp)


def make_method_step(method: Optional[str], device: torch.device, amp: bool) -> Tuple[Callable, float]:
    """A training step of a resnet18 at 64 px with 100 classes, batch 32, and the MiB of what the loss keeps."""
    torch.manual_seed(0)
    model = timm.create_model('resnet18', num_classes=100).to(device)
    if method is None:
        task = ClassificationTask(model, nn.CrossEntropyLoss(), device=device, verbose=False)
    else:
        task = CoreTuningTask(model, method, device=device, verbose=False)
    kept = [*task.criterion.parameters(), *task.criterion.buffers()]
    input, target = torch.randn(32, 3, 64, 64, device=device), torch.randint(100, (32,), device=device)
    return repeat_step(task, input, target, amp), sum(x.numel() * x.element_size() for x in kept) / 2**20


def report_methods(num_pairs: int, device: torch.device, amp: bool) -> None:
    print('| method | step, against cross-entropy | seconds | kept beside the model, MiB |')
    print('|---|---|---|---|')
    plain, _ = make_method_step(None, device, amp)
    for method in METHODS:
        step, kept = make_method_step(method, device, amp)
        a, b, ratio, _ = time_pairs(step, plain, num_pairs, device)
        print(f'| `{method}` | {ratio:.2f} | {a:.4g} / {b:.4g} | {kept:.1f} |', flush=True)


def repeat_step(task: nn.Module, input: torch.Tensor, target: torch.Tensor, amp: bool) -> Callable:
    """Forward, backward and update of a batch."""
    optimizer = torch.optim.SGD(task.parameters(), lr=1e-4, momentum=0.9, nesterov=True)
    device = input.device
    follow = getattr(task, 'after_update', lambda: None)
    if isinstance(task, CoreTuningTask):
        task.attach_optimizer(optimizer)
        task.start(10_000)
    task.get_trainable_module().train()

    def step():
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
            loss = task(input, target)['loss']
        loss.backward()
        optimizer.step()
        follow()
        optimizer.zero_grad()

    return step


def _report_peak(task_type: type, batch_size: int, connection) -> None:
    step = make_dense_step(task_type, batch_size, torch.device('cpu'), amp=False)
    for _ in range(3):
        step()
    connection.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def measure_peak(task_type: type, batch_size: int) -> float:
    """Greatest resident memory of a process that makes dense steps on the CPU, MiB."""
    context = multiprocessing.get_context('spawn')
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report_peak, args=(task_type, batch_size, sender))
    process.start()
    peak = receiver.recv()
    process.join()
    return peak


def transcribe(
    features: torch.Tensor,
    target: torch.Tensor,
    classifier: nn.Linear,
    projector: nn.Module,
    draws: MixupDraws,
    contrast_weight: float = 0.1,
    temperature: float = 0.07,
) -> torch.Tensor:
    """The loss as its formulas read: mixed features and targets are built, all 3B rows are projected and classified."""
    batch_size, num_classes = len(target), classifier.out_features
    with torch.no_grad():
        similarity = F.normalize(features, dim=1) @ F.normalize(features, dim=1).T
        same = target[:, None] == target
        itself = torch.eye(batch_size, dtype=torch.bool, device=target.device)
        positive = same & ~itself
        alone = ~positive.any(dim=1)
        hard_positive = similarity.masked_fill(~positive, float('inf')).argmin(dim=1)
        hard_positive = torch.where(alone, torch.arange(batch_size, device=target.device), hard_positive)
        hard_negative = similarity.masked_fill(same, float('-inf')).argmax(dim=1)
        # the k-th candidate of another class
        k = (draws.random_negative * (~same).sum(dim=1)).long()
        by_class = torch.argsort(target, stable=True)
        rank = (~same[:, by_class]).cumsum(dim=1) - 1
        random_negative = by_class[((rank == k[:, None]) & ~same[:, by_class]).int().argmax(dim=1)]

    soft = F.one_hot(target, num_classes).to(features.dtype)
    a, b = draws.positive_lam[:, None], draws.negative_lam[:, None]
    rows = torch.cat(
        [
            features,
            a * features[hard_positive] + (1 - a) * features[hard_negative],
            (1 - b) * features + b * features[random_negative],
        ]
    )
    soft_rows = torch.cat(
        [soft, a * soft[hard_positive] + (1 - a) * soft[hard_negative], (1 - b) * soft + b * soft[random_negative]]
    )
    task_loss = -(soft_rows * classifier(rows).log_softmax(dim=1)).sum(dim=1).mean()

    v, v_positive, v_negative = F.normalize(projector.fc2(F.relu(projector.fc1(rows))), dim=1).chunk(3)
    logits = torch.cat(
        [
            (v @ v.T).masked_fill(itself, float('-inf')),
            (v * v_positive).sum(dim=1, keepdim=True),
            (v * v_negative).sum(dim=1, keepdim=True),
        ],
        dim=1,
    )
    log_p = (logits / temperature).log_softmax(dim=1)
    mask = torch.cat([positive, torch.ones_like(itself[:, :1]), torch.zeros_like(itself[:, :1])], dim=1)
    pair_loss = ((log_p.exp() - 1) * log_p).masked_fill(~mask, 0.0)
    return task_loss + contrast_weight * (pair_loss.sum(dim=1) / mask.sum(dim=1)).mean()


def make_criteria(batch_size: int, width: int, num_classes: int, device: torch.device) -> Tuple[Callable, Callable]:
    """The criterion and its transcription, each forward and backward from the same features and draws."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    # non-negative, as pooled features after a ReLU are
    features = torch.rand(batch_size, width, generator=generator).to(device).requires_grad_()
    target = torch.randint(num_classes, (batch_size,), generator=generator).to(device)
    classifier = nn.Linear(width, num_classes).to(device)
    criterion = CoreTuningLoss(width).to(device)
    batch, draws = criterion.prepare(batch_size, device)

    def ours() -> torch.Tensor:
        return criterion.compute(features, classifier(features), target, batch, draws)['loss']

    def theirs() -> torch.Tensor:
        return transcribe(features, target, classifier, criterion.projector, draws)

    torch.testing.assert_close(ours(), theirs(), rtol=1e-4, atol=1e-5)
    return (lambda: ours().backward()), (lambda: theirs().backward())


def make_contrast(batch_size: int, width: int, num_classes: int, device: torch.device) -> Callable:
    """Mining, and the contrastive loss forward and backward, of labels among num_classes."""
    torch.manual_seed(0)
    features = torch.rand(batch_size, width, device=device)
    embedding = torch.randn(batch_size, 256, device=device, requires_grad=True)
    label = torch.randint(num_classes, (batch_size,), device=device)
    criterion = CoreTuningLoss(width)
    _, draws = criterion.prepare(batch_size, device)

    def run():
        pairs = criterion.mixup.pair(features, label, draws)
        positive, negative = pairs.positive.mix(embedding), pairs.negative.mix(embedding)
        criterion.contrast(embedding, label, extra_positive=positive, extra_negative=negative).backward()

    return run


def describe_machine(device: torch.device = torch.device('cpu')) -> str:  # noqa: B008, immutable
    """Processor or accelerator, threads and versions, for the line under the table."""
    name = platform.processor() or platform.machine()
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
    elif os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as f:
            name = next((line.split(':')[1].strip() for line in f if line.startswith('model name')), name)
    return f'{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, timm {timm.__version__}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--pairs', type=int, default=9, metavar='N', help='alternating pairs, at least 7 (default: 9)')
    parser.add_argument('--dense-batch-size', type=int, default=4, metavar='N', help='images to segment (default: 4)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='where to run')
    parser.add_argument('--amp', action='store_true', help='bfloat16 autocast around the training steps')
    parser.add_argument('--methods', action='store_true', help='only what each method costs')
    args = parser.parse_args()
    if args.pairs < 7:
        parser.error(f'argument --pairs: expected at least 7 for a median worth quoting, got {args.pairs}')
    device = torch.device(args.device)
    if args.methods:
        report_methods(args.pairs, device, args.amp)
        print(f'\n{describe_machine(device)}; median of {args.pairs} pairs')
        return

    print('| what | against | ratio | seconds | ratio of wall times |')
    print('|---|---|---|---|---|')

    def report(what: str, against: str, first: Callable, second: Callable, num_pairs: int) -> None:
        a, b, ratio, wall_ratio = time_pairs(first, second, num_pairs, device)
        print(f'| {what} | {against} | {ratio:.3f} | {a:.4g} / {b:.4g} | {wall_ratio:.3f} |', flush=True)

    for name, batch_size in (('resnet50', 16), ('vit_tiny_patch16_224', 64)):
        steps = [make_step(task, name, batch_size, device, args.amp) for task in (CoreTuningTask, ClassificationTask)]
        report(f'{name} step, batch {batch_size}, Core-tuning', 'cross-entropy', *steps, args.pairs)
    tasks = (SegmentationTask, ClassificationTask)
    steps = [make_dense_step(task, args.dense_batch_size, device, args.amp) for task in tasks]
    what = f'resnet50 DeepLab-V3 step, 256 px, batch {args.dense_batch_size}, dense Core-tuning'
    report(what, 'dense cross-entropy', *steps, args.pairs)
    if device.type == 'cpu':
        a, b = (statistics.median(measure_peak(task, args.dense_batch_size) for _ in range(3)) for task in tasks)
        print(f'| peak memory of such steps | dense cross-entropy | {a / b:.3f} | {a:.0f} / {b:.0f} MiB | - |')
    ours, theirs = make_criteria(256, 2048, 100, device)
    report('criterion, transcribed with 3B rows (B 256, D 2048, C 100)', 'ours', theirs, ours, 3 * args.pairs)
    few = make_contrast(256, 2048, 10, device)
    for num_classes in (100, 1000, 32000):
        many = make_contrast(256, 2048, num_classes, device)
        report(f'mining and contrast, {num_classes} classes (B 256)', '10 classes', many, few, 10 * args.pairs)
    print(f'\n{describe_machine(device)}; median of {args.pairs} pairs or more')


if __name__ == '__main__':
    main()
