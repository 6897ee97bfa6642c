#!/usr/bin/env python3
"""On how few rows do hardest positives, and the loss of their mixtures, fall?

    python benchmarks/concentration.py

Each anchor of a batch mixes its hardest positive, the least similar row of its class. If all anchors of a class choose
the same few rows, these rows decide what the classifier learns from mixtures. This tunes the bundled checkpoint on the
bundled sample with the paper's mixtures and prints one Markdown table: images in batches of many and of few classes,
and pixels, each in the first and in the last ten updates. A row of a batch is an image, or an anchor pixel. Lines of
the table differ in how many random rows of the class are searched for the hardest: all as in the paper, 4, or 1, which
is a random positive and shows the concentration of chance.
"""

import argparse
import logging
import math
import os
import tempfile
from typing import Any, Dict, List, NamedTuple, Tuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from step import describe_machine
from timm.utils import random_seed

import timm_coretune
from timm_coretune.loss import CoreTuningLoss
from timm_coretune.mixup import Mixture
from timm_coretune.train.cli.arguments import parse_args
from timm_coretune.train.session import kind_of, set_up

_ASSETS = os.path.join(os.path.dirname(timm_coretune.__file__), 'assets')
_SAMPLE = os.path.join(_ASSETS, 'fashion_mnist_sample.safetensors')
_WINDOW = 10  # updates that are averaged at either end of a run
_METHOD = ['--coretune', '--contrast-weight', '0.1', '--coretune-smooth', 'both', '--coretune-mixtures', 'both']


class Concentration(NamedTuple):
    """How unevenly the anchors of a batch choose their hardest positives. All are percentages.

    Attributes:
        top_row: Anchors whose hardest positive is the most used row.
        of_class: Those whose hardest positive is the most used row of their class.
        top_ten: Those of the ten most used rows.
        top_percent: Those of the most used 1 % of the rows, at least one.
        loss: Share of the cross-entropy of hard positive mixtures that is of these rows' mixtures.
        wrong: Share of these rows that are wrongly predicted.
        wrong_all: Share of all rows that are wrongly predicted.
    """

    top_row: float
    of_class: float
    top_ten: float
    top_percent: float
    loss: float
    wrong: float
    wrong_all: float


def mixture_loss(mixture: Mixture, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every mixture (A,) from the logits (N, C) and classes (N,) of the rows that are mixed."""
    mixed = mixture.mix(logits)
    first, second = (F.cross_entropy(mixed, label[rows], reduction='none') for rows in (mixture.index, mixture.other))
    return mixture.lam * first + (1 - mixture.lam) * second


def concentrate(
    chosen: torch.Tensor,
    loss: torch.Tensor,
    label: torch.Tensor,
    is_wrong: torch.Tensor,
) -> Concentration:
    """Count how often each row is chosen.

    Args:
        chosen: Row of the hardest positive of each anchor (A,).
        loss: Cross-entropy of the mixture of each anchor (A,).
        label: Class of each row (N,).
        is_wrong: Whether each row is wrongly predicted (N,).
    """
    num_rows = len(label)
    uses = torch.bincount(chosen, minlength=num_rows)
    loss_of_row = torch.zeros(num_rows, dtype=loss.dtype).index_add(0, chosen, loss)
    most_of_class = torch.zeros_like(uses).scatter_reduce(0, label, uses, 'amax')
    most_used = uses.argsort(descending=True, stable=True)
    percent = most_used[: math.ceil(num_rows / 100)]
    shares = (
        uses[most_used[0]] / len(chosen),
        most_of_class.sum() / len(chosen),
        uses[most_used[:10]].sum() / len(chosen),
        uses[percent].sum() / len(chosen),
        loss_of_row[percent].sum() / loss.sum(),
        is_wrong[percent].float().mean(),
        is_wrong.float().mean(),
    )
    return Concentration(*(100 * float(share) for share in shares))


def watch(criterion: CoreTuningLoss) -> List[Concentration]:
    """Make a loss measure each batch that it computes. Returns the list of what was measured, which grows."""
    measured: List[Concentration] = []
    pair, compute = criterion.mixup.pair, criterion.compute
    pairs: List[Any] = []

    def pair_and_keep(*args: Any, **kwargs: Any) -> Any:
        pairs.append(pair(*args, **kwargs))
        return pairs[-1]

    def compute_and_measure(features: Any, logits: torch.Tensor, label: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        losses = compute(features, logits, label, *args, **kwargs)
        mixture, logits = pairs.pop().positive, logits.detach().float()
        takes_part = label >= 0
        # an anchor that is alone in its class has no positive but itself
        is_anchor = takes_part & (mixture.index != torch.arange(len(label)))
        row_of = takes_part.cumsum(0) - 1
        loss = mixture_loss(mixture, logits, label.clamp(min=0))
        is_wrong = logits.argmax(dim=1) != label
        chosen = row_of[mixture.index[is_anchor]]
        measured.append(concentrate(chosen, loss[is_anchor], label[takes_part], is_wrong[takes_part]))
        return losses

    criterion.mixup.pair, criterion.compute = pair_and_keep, compute_and_measure  # type: ignore[method-assign]
    return measured


def take_classes(num_classes: int, folder: str) -> str:
    """Write the first classes of the sample to a file of their own, and return its path."""
    tensors = load_file(_SAMPLE)
    taken: Dict[str, torch.Tensor] = {}
    for split in ('train', 'validation'):
        is_taken = tensors[f'{split}.label'] < num_classes
        taken |= {f'{split}.{key}': tensors[f'{split}.{key}'][is_taken] for key in ('image', 'label')}
    path = os.path.join(folder, f'{num_classes}_classes.safetensors')
    save_file(taken, path)
    return path


def train(words: List[str], accelerator: Accelerator) -> List[Concentration]:
    """Train as train.py does with these words, and return what was measured in each update."""
    parsed = parse_args(words)
    random_seed(parsed.settings.loop.seed)
    kind = kind_of(parsed.settings)
    run = set_up(parsed, kind, accelerator, kind.open_datasets(parsed.settings))
    measured = watch(run.trainer.task.criterion)
    run.trainer.fit(run.loaders.train, None, run.epochs)
    if run.lock is not None:
        run.lock.release()
    return measured


def print_row(name: str, when: str, candidates: int, measured: List[Concentration]) -> None:
    means = [sum(values) / len(measured) for values in zip(*measured, strict=True)]
    cells = ' | '.join(f'{mean:.0f}' if mean >= 10 else f'{mean:.1f}' for mean in means)
    print(f'| {name} | {when} | {candidates or "all"} | {cells} |', flush=True)


def cases(folder: str) -> List[Tuple[str, List[str]]]:
    """Names of what is tuned, with the flags of train.py for about 120 updates, 60 of pixels and 30 of 256 images."""
    images = ['-c', os.path.join(_ASSETS, 'sample.yaml')]
    images += ['--pretrained-path', os.path.join(_ASSETS, 'test_resnet_mocov2.safetensors')]
    found = [('images, 10 classes, batch 64', [*images, '--data-dir', _SAMPLE, '--epochs', '2'])]
    for num_classes, batch_size, epochs in ((3, 64, 7), (2, 64, 10), (2, 256, 10)):
        flags = ['--data-dir', take_classes(num_classes, folder), '--num-classes', str(num_classes)]
        flags += ['-b', str(batch_size), '--epochs', str(epochs)]
        found.append((f'images, {num_classes} classes, batch {batch_size}', [*images, *flags]))
    return [*found, ('pixels, 1024 anchors', ['--segmentation', '--epochs', '2'])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seed', type=int, default=0, metavar='N', help='random seed of all runs (default: 0)')
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    accelerator = Accelerator(cpu=True)
    print(
        '| what | updates | positives searched | most used row, % of anchors | most used row of each class | ten most '
        'used rows | most used 1 % | its % of the mixture loss | wrongly predicted, % of it | of all rows |'
    )
    print('|---|---|---|---|---|---|---|---|---|---|')
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, flags) in enumerate(cases(folder)):
            for candidates in (0, 4, 1):
                words = [*_METHOD, *flags, '--device', 'cpu', '--val-split', '', '--seed', str(args.seed)]
                words += ['--coretune-positive-candidates', str(candidates), '--output', folder]
                measured = train([*words, '--experiment', f'{number}_{candidates}'], accelerator)
                print_row(name, f'first {_WINDOW}', candidates, measured[:_WINDOW])
                print_row(name, f'last {_WINDOW} of {len(measured)}', candidates, measured[-_WINDOW:])
    print(f'\n{describe_machine()}; means over {_WINDOW} updates, seed {args.seed}')


if __name__ == '__main__':
    main()
