#!/usr/bin/env python3
"""Pretrains any timm model without labels, by SimCLR or MoCo v2, on folders of pictures.

Question answered: what do features gain from contrastive pretraining on the pictures of a task, from scratch or from
other weights? A Markdown table has the kNN figures of raw pixels, of untrained networks, of the weights at the start
and of the result. `train.py --pretrained-path FILE` loads the result by its names.

    python scripts/pretrain.py --method simclr --model mobilenetv2_100 --pretrained-path WEIGHTS --img-size 64 \
        --data-dir DIR/train DIR/val --unseen DIR/test --bank DIR/train --queries DIR/val \
        --license 'CC-BY-4.0 (pictures)' --output FILE.safetensors

All pictures below --data-dir are trained on, whatever their folder is called. The script refuses to start if one of
--unseen is among them. --bank and --queries have a folder for each class and serve only the table. Pictures are decoded
once and stay in memory, a third larger than a view. Grey ones get three equal channels, as in train.py.

The same seed gives the same draws on every device, but sums depend on the device and the number of threads, so weights
are reproduced closely rather than to the bit. docs/pretraining.md has the networks that were made.
"""

import argparse
import hashlib
import logging
import math
import os
import time
from typing import List, Optional, Tuple

import timm
import torch
import torch.nn.functional as F
from augment import Augment
from contrastive import MoCo, SimCLR
from make_sample import to_bytes, write_atomically
from PIL import Image, ImageOps
from timm.data import resolve_data_config
from timm.optim import create_optimizer_v2
from timm.utils import ParseKwargs
from torch import nn
from torchvision.datasets.folder import IMG_EXTENSIONS, ImageFolder

from timm_coretune import load_checkpoint
from timm_coretune.evaluation.features import KNN_NEIGHBOURS, knn_predict

_logger = logging.getLogger('pretrain')

METHODS = {'simclr': 'SimCLR', 'moco': 'MoCo v2'}
NUM_RANDOM = 3  # one untrained network scores several points better or worse than another


def parse_args(arguments: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='SimCLR or MoCo-v2 pretraining of a timm model on pictures')
    parser.add_argument('--method', required=True, choices=METHODS)
    parser.add_argument('--model', required=True, help='name of a timm model')
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE')
    parser.add_argument('--pretrained-path', metavar='SOURCE', help='weights at the start (default: random ones)')
    parser.add_argument('--data-dir', required=True, nargs='+', metavar='DIR', help='pictures to train on')
    parser.add_argument('--unseen', nargs='*', default=[], metavar='DIR', help='pictures that must not be among them')
    parser.add_argument('--bank', required=True, metavar='DIR', help='labelled pictures that vote in kNN')
    parser.add_argument('--queries', required=True, metavar='DIR', help='labelled pictures that kNN classifies')
    parser.add_argument('--license', required=True, help='licence of pictures and weights, written to the metadata')
    parser.add_argument('--output', required=True, metavar='FILE.safetensors')
    parser.add_argument('--img-size', type=int, default=32)
    parser.add_argument('--epochs', type=int, default=20)
    parser.add_argument('--batch-size', type=int, default=128)
    parser.add_argument('--opt', default='sgd', help="optimizer of timm, such as 'adamw' for a ViT")
    parser.add_argument('--lr', type=float, default=0.06, help='peak rate, after a tenth of the run')
    parser.add_argument('--weight-decay', type=float, default=1e-4)
    parser.add_argument('--temperature', type=float, default=0.2)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--amp', action='store_true', help='compute in bfloat16 where autocast does')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    group = parser.add_argument_group('MoCo v2')
    group.add_argument('--encoder-momentum', type=float, default=0.99)
    group.add_argument('--queue-size', type=int, default=2048)
    group.add_argument('--bn-groups', type=int, default=2, help='parts of a batch with BN statistics of their own')
    group = parser.add_argument_group('views')
    group.add_argument('--min-crop', type=float, default=0.3, help='smallest area of a random resized crop')
    group.add_argument('--flip-prob', type=float, default=0.5)
    group.add_argument('--rotation', type=float, default=0, metavar='DEGREES')
    group.add_argument('--jitter', type=float, default=0.4, help='strength of changes of brightness and colours')
    group.add_argument('--grey-prob', type=float, default=0.2)
    group.add_argument('--blur-prob', type=float, default=0.5)
    args = parser.parse_args(arguments)
    if args.method == 'moco' and (args.queue_size % args.batch_size or args.batch_size % args.bn_groups):
        parser.error('--queue-size must be a multiple of --batch-size, and --batch-size one of --bn-groups')
    return args


def find_pictures(folders: List[str]) -> List[str]:
    """Returns the paths of all pictures below folders."""
    paths: List[str] = []
    for folder in folders:
        found = (os.path.join(top, name) for top, _, names in os.walk(folder) for name in names)
        pictures = sorted(path for path in found if path.lower().endswith(IMG_EXTENSIONS))
        if not pictures:
            raise FileNotFoundError(f'Expected pictures in {folder!r} or below it, found none.')
        paths += pictures
    return paths


def read_pictures(paths: List[str], side: int) -> torch.Tensor:
    """Decodes pictures into a uint8 tensor (number, 3, side, side). What is not square is cut to its middle."""
    pictures = torch.empty(len(paths), side, side, 3, dtype=torch.uint8)
    for picture, path in zip(pictures, paths, strict=True):
        with Image.open(path) as image:
            fitted = ImageOps.fit(image.convert('RGB'), (side, side), Image.Resampling.BICUBIC)
        picture.copy_(torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8).view_as(picture))
    return pictures.permute(0, 3, 1, 2)


def read_labelled(folder: str, side: int) -> Tuple[torch.Tensor, torch.Tensor]:
    samples = ImageFolder(folder).samples
    return read_pictures([path for path, _ in samples], side), torch.tensor([label for _, label in samples])


def load_train_pictures(args: argparse.Namespace, side: int) -> torch.Tensor:
    """Loads the pictures to train on and makes sure that no other picture is among them."""
    pictures = read_pictures(find_pictures(args.data_dir), side)
    unseen = read_pictures(find_pictures(args.unseen), side)
    trained, other = ({hashlib.sha256(p.numpy().tobytes()).digest() for p in part} for part in (pictures, unseen))
    if trained & other:
        raise ValueError(f'{len(trained & other)} pictures of --unseen are in --data-dir: train on other folders.')
    if len(pictures) < args.batch_size:
        raise ValueError(f'Expected at least --batch-size {args.batch_size} pictures, found {len(pictures)}.')
    return pictures


def knn_top1(bank: torch.Tensor, bank_labels: torch.Tensor, queries: torch.Tensor, labels: torch.Tensor) -> float:
    """Top-1 per cent of kNN, the neighbours of which are in a bank."""
    num_classes = int(bank_labels.max()) + 1
    predictions, _ = knn_predict(queries, bank, bank_labels, num_classes, min(KNN_NEIGHBOURS, len(bank)))
    return (predictions == labels).float().mean().item() * 100


class Network:
    """A backbone, and the normalisation of its pictures: that of the weights at the start, else that of timm."""

    def __init__(self, args: argparse.Namespace, seed: int, pretrained_path: Optional[str] = None) -> None:
        torch.manual_seed(seed)  # the constructors of timm take no generator
        self.img_size, self.device = args.img_size, args.device
        self.backbone = timm.create_model(args.model, num_classes=0, **args.model_kwargs)
        if pretrained_path:
            load_checkpoint(self.backbone, pretrained_path)
        self.backbone.to(args.device, memory_format=torch.channels_last)
        config = resolve_data_config({}, model=self.backbone)
        self.mean, self.std = config['mean'], config['std']

    def normalise(self, views: torch.Tensor) -> torch.Tensor:
        mean, std = (torch.tensor(values, device=views.device).view(3, 1, 1) for values in (self.mean, self.std))
        return ((views - mean) / std).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def extract_features(self, pictures: torch.Tensor) -> torch.Tensor:
        """Returns the pooled features of whole pictures."""
        self.backbone.eval()
        views = (shrink(part.to(self.device), self.img_size) for part in pictures.split(250))
        return torch.cat([self.backbone(self.normalise(view)).cpu() for view in views])


def shrink(pictures: torch.Tensor, size: int) -> torch.Tensor:
    return F.interpolate(pictures.float() / 255, size=size, mode='bilinear', antialias=True)


def pretrain(method: nn.Module, network: Network, pictures: torch.Tensor, args: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(args.seed)
    strengths = {name: getattr(args, name) for name in Augment.__dataclass_fields__ if name in args}
    augment = Augment(**strengths, generator=generator)
    optimizer = create_optimizer_v2(method, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay, momentum=0.9)
    num_batches = len(pictures) // args.batch_size  # the last, smaller batch is left out: a queue takes whole ones
    total = args.epochs * num_batches

    def factor(step: int) -> float:
        warm_up = min(1.0, (step + 1) / (total / 10))
        return warm_up * 0.5 * (1 + math.cos(math.pi * step / total))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for epoch in range(1, args.epochs + 1):
        start, losses = time.perf_counter(), torch.zeros(())
        method.train()
        order = torch.randperm(len(pictures), generator=generator)
        for indices in order[: num_batches * args.batch_size].split(args.batch_size):
            batch = pictures[indices].to(args.device)
            first, second = (network.normalise(augment(batch)) for _ in range(2))
            with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.amp):
                loss = method(first, second)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses += loss.detach().cpu() / num_batches
        if not losses.isfinite():
            raise RuntimeError('The loss is not finite: try a smaller --lr.')
        _logger.info(f'epoch {epoch}/{args.epochs}: loss {losses:.4f}, {time.perf_counter() - start:.0f} s')


def save_checkpoint(
    method: nn.Module, network: Network, rows: List[Tuple[str, float]], args: argparse.Namespace
) -> None:
    folders = ', '.join('/'.join(os.path.abspath(folder).split(os.sep)[-2:]) for folder in args.data_dir)
    metadata = {
        'method': METHODS[args.method],
        'architecture': args.model,
        'model_args': ' '.join(f'{key}={value}' for key, value in args.model_kwargs.items()),
        'input_size': f'3 {args.img_size} {args.img_size}',
        'mean': ' '.join(map(str, network.mean)),
        'std': ' '.join(map(str, network.std)),
        'knn_top1': f'{rows[-1][1]:.1f}',
        'epochs': str(args.epochs),
        'seed': str(args.seed),
        'start': os.path.basename(args.pretrained_path or 'random weights'),
        'data': f'without labels: {folders}',
        'license': args.license,
    }
    tensors = {key: value.detach().cpu().contiguous() for key, value in method.export().items()}
    write_atomically(args.output, to_bytes(tensors, metadata))
    _logger.info(f'Wrote {args.output}: {os.path.getsize(args.output)} bytes')


def main(arguments: Optional[List[str]] = None) -> None:
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    args = parse_args(arguments)
    side = round(args.img_size * 4 / 3)
    pictures = load_train_pictures(args, side)
    bank, queries = read_labelled(args.bank, side), read_labelled(args.queries, side)

    def score(network: Network) -> float:
        return knn_top1(network.extract_features(bank[0]), bank[1], network.extract_features(queries[0]), queries[1])

    pixels = [shrink(part, args.img_size).flatten(1) for part in (bank[0], queries[0])]
    rows = [('raw pixels', knn_top1(pixels[0], bank[1], pixels[1], queries[1]))]
    random = [score(Network(args, args.seed + i)) for i in range(NUM_RANDOM)]
    rows.append((f'random {args.model}, mean of {NUM_RANDOM} seeds', sum(random) / NUM_RANDOM))
    network = Network(args, args.seed, args.pretrained_path)
    if args.pretrained_path:
        rows.append((f'{args.model}, {os.path.basename(args.pretrained_path)}', score(network)))
    if args.method == 'simclr':
        method: nn.Module = SimCLR(network.backbone, args.temperature)
    else:
        generator = torch.Generator().manual_seed(args.seed)
        queue = (args.queue_size, args.encoder_momentum, args.bn_groups)
        method = MoCo(network.backbone, args.temperature, *queue, generator)
    method.to(args.device)
    pretrain(method, network, pictures, args)
    rows.append((f'{args.model}, {METHODS[args.method]}, {args.epochs} epochs', score(network)))
    print(f'| features | kNN top-1 % (k={KNN_NEIGHBOURS}, cosine, weighted votes) |\n|---|---:|')
    print('\n'.join(f'| {name} | {value:.1f} |' for name, value in rows))
    save_checkpoint(method, network, rows, args)


if __name__ == '__main__':
    main()
