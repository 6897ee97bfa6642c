#!/usr/bin/env python3
"""Pretrains the small MoCo-v2 checkpoint that travels with the package.

Question answered: does a contrastive checkpoint that is small enough to ship carry useful features, i.e. does kNN on
its frozen features beat kNN on an untrained network and on raw pixels? The script trains timm's `test_resnet` without
labels by MoCo v2 (He et al., arXiv 1911.05722; Chen et al., arXiv 2003.04297), prints that comparison as a Markdown
table and writes the checkpoint with the keys that a MoCo-v2 run under DDP leaves behind (`module.encoder_q.*`,
`module.encoder_k.*`, `module.queue`, `module.queue_ptr`), flattened into a safetensors file.

Only the train split is used. The labelled sample's validation images come from the test split; the script refuses to
start if one of them is among the pretraining images.

Run it after `make_sample.py`, on a folder in the layout of `torchvision.datasets.FashionMNIST(root=DIR)`:

    python scripts/pretrain_sample.py --data-dir DIR --seed 0 \
        --output timm_coretune/assets/test_resnet_mocov2.safetensors

The same seed gives the same draws on every device, but floating-point sums depend on the device and on the number of
threads, so the weights are reproduced closely rather than to the bit.
"""

import argparse
import hashlib
import logging
import math
import os
import time
from typing import Dict, Iterator, List, Set, Tuple

import timm
import torch
import torch.nn.functional as F
from make_sample import DEFAULT_OUTPUT as SAMPLE
from make_sample import LICENSE, load_split, to_bytes, write_atomically
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

_logger = logging.getLogger('pretrain_sample')

DEFAULT_OUTPUT = os.path.join('timm_coretune', 'assets', 'test_resnet_mocov2.safetensors')
ARCHITECTURE = 'test_resnet'
IMAGE_SIZE = 32
PROJECTION_SIZE = 128
KNN_NEIGHBOURS = 20
KNN_TEMPERATURE = 0.07
NUM_RANDOM = 5


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='MoCo-v2 pretraining of test_resnet on Fashion-MNIST')
    parser.add_argument('--data-dir', required=True, metavar='DIR', help='root of torchvision.datasets.FashionMNIST')
    parser.add_argument('--sample', default=SAMPLE, metavar='FILE')
    parser.add_argument('--output', default=DEFAULT_OUTPUT, metavar='FILE')
    parser.add_argument('--epochs', type=int, default=18)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--eval-every', type=int, default=3, metavar='N', help='epochs between kNN checks')
    group = parser.add_argument_group('MoCo v2')
    group.add_argument('--batch-size', type=int, default=128)
    group.add_argument('--lr', type=float, default=0.06, help='peak rate, decayed by a half cosine')
    group.add_argument('--weight-decay', type=float, default=1e-4)
    group.add_argument('--encoder-momentum', type=float, default=0.99)
    group.add_argument('--temperature', type=float, default=0.2)
    group.add_argument('--queue-size', type=int, default=2048)
    group.add_argument('--bn-groups', type=int, default=2, help='parts of a batch with BN statistics of their own')
    group = parser.add_argument_group('augmentation')
    group.add_argument('--min-crop', type=float, default=0.3, help='smallest area of a random resized crop')
    group.add_argument('--jitter', type=float, default=0.8, help='strength of brightness and contrast changes')
    group.add_argument('--blur-prob', type=float, default=0.5)
    args = parser.parse_args()
    if args.queue_size % args.batch_size:
        parser.error('--queue-size must be a multiple of --batch-size')
    if args.batch_size % args.bn_groups:
        parser.error('--batch-size must be a multiple of --bn-groups')
    return args


class Augment:
    """Random views of a whole batch of grey images at once.

    All draws are made on the CPU from one generator, so that a run sees the same views whatever the device.

    Args:
        min_crop: Smallest share of the area that a random resized crop keeps.
        jitter: Largest relative change of brightness and of contrast.
        blur_prob: Share of the views that are blurred.
        generator: Source of every random draw.
    """

    def __init__(
        self,
        min_crop: float,
        jitter: float,
        blur_prob: float,
        generator: torch.Generator,
    ) -> None:
        self.min_crop = min_crop
        self.jitter = jitter
        self.blur_prob = blur_prob
        self.generator = generator

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Returns one normalised view, (batch, 3, size, size), of each uint8 image."""
        x = images.unsqueeze(1).float() / 255
        x = self._crop_and_flip(x)
        x = self._jitter(x)
        x = self._blur(x)
        return normalise(x)

    def _uniform(self, x: torch.Tensor, low: float, high: float) -> torch.Tensor:
        draws = torch.rand(len(x), generator=self.generator)
        return (low + (high - low) * draws).to(x.device)

    def _crop_and_flip(self, x: torch.Tensor) -> torch.Tensor:
        area = self._uniform(x, self.min_crop, 1.0)
        ratio = self._uniform(x, math.log(3 / 4), math.log(4 / 3)).exp()
        width = (area * ratio).sqrt().clamp(max=1)
        height = (area / ratio).sqrt().clamp(max=1)
        flip = torch.where(self._uniform(x, 0, 1) < 0.5, -1.0, 1.0)
        # In affine_grid's coordinates the image spans [-1, 1]: a crop of relative width w has room 1 - w to each side.
        zero = torch.zeros_like(area)
        theta = torch.stack(
            [
                torch.stack([width * flip, zero, (1 - width) * self._uniform(x, -1, 1)], dim=1),
                torch.stack([zero, height, (1 - height) * self._uniform(x, -1, 1)], dim=1),
            ],
            dim=1,
        )
        grid = F.affine_grid(theta, [len(x), 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
        return F.grid_sample(x, grid, padding_mode='border', align_corners=False)

    def _jitter(self, x: torch.Tensor) -> torch.Tensor:
        shape = (-1, 1, 1, 1)
        brightness = self._uniform(x, 1 - self.jitter, 1 + self.jitter).view(shape)
        contrast = self._uniform(x, 1 - self.jitter, 1 + self.jitter).view(shape)
        x = (x * brightness).clamp(0, 1)
        mean = x.mean(dim=(2, 3), keepdim=True)
        return ((x - mean) * contrast + mean).clamp(0, 1)

    def _blur(self, x: torch.Tensor) -> torch.Tensor:
        taps = torch.tensor([1.0, 2.0, 1.0], device=x.device) / 4
        blurred = F.conv2d(F.pad(x, (1, 1, 1, 1), mode='replicate'), torch.outer(taps, taps).view(1, 1, 3, 3))
        chosen = (self._uniform(x, 0, 1) < self.blur_prob).float()
        # A mix with the sharp image stands in for a random width of the Gaussian, which would need a kernel per image.
        strength = (chosen * self._uniform(x, 0, 1)).view(-1, 1, 1, 1)
        return torch.lerp(x, blurred, strength)


def normalise(x: torch.Tensor) -> torch.Tensor:
    """Maps grey values in [0, 1] to three equal channels with mean 0.5 and std 0.5 taken out."""
    return ((x - 0.5) / 0.5).expand(-1, 3, -1, -1)


def create_encoder() -> nn.Module:
    """Builds the backbone with MoCo v2's two-layer head in place of the classifier, so its keys start with `fc.`."""
    encoder = timm.create_model(ARCHITECTURE, num_classes=0)
    size = encoder.num_features
    encoder.fc = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, PROJECTION_SIZE))
    return encoder


class MoCo(nn.Module):
    """Momentum contrast with a queue of past keys.

    Args:
        queue_size: Number of keys kept as negatives.
        encoder_momentum: Share of the old key encoder that an update keeps.
        temperature: Divisor of the similarities.
        bn_groups: Parts of a batch whose BN statistics are taken apart.
        generator: Source of every random draw, except for the initial weights.
    """

    def __init__(
        self,
        queue_size: int,
        encoder_momentum: float,
        temperature: float,
        bn_groups: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.encoder_momentum = encoder_momentum
        self.temperature = temperature
        self.bn_groups = bn_groups
        self.generator = generator
        self.encoder_q = create_encoder()
        self.encoder_k = create_encoder().requires_grad_(False)
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())
        queue = torch.randn(PROJECTION_SIZE, queue_size, generator=generator)
        self.register_buffer('queue', F.normalize(queue, dim=0))
        self.register_buffer('queue_ptr', torch.zeros(1, dtype=torch.long))

    def forward(self, query_view: torch.Tensor, key_view: torch.Tensor) -> torch.Tensor:
        """Returns the InfoNCE loss of two views of the same images and puts the keys into the queue."""
        queries = self._encode(self.encoder_q, query_view)
        with torch.no_grad():
            self._update_key_encoder()
            keys = self._encode_shuffled(key_view)
        positive = (queries * keys).sum(dim=1, keepdim=True)
        logits = torch.cat([positive, queries @ self.queue.clone()], dim=1) / self.temperature
        self._enqueue(keys)
        return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))

    def _encode(self, encoder: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(torch.cat([encoder(part) for part in x.chunk(self.bn_groups)]), dim=1)

    def _encode_shuffled(self, x: torch.Tensor) -> torch.Tensor:
        # A positive pair is in the current batch and the negatives are in past ones, so common BN statistics would give
        # the positive away. The paper shuffles the keys among the GPUs; one process does the same among parts of the
        # batch: query and key of an image are then normalised in the company of different images.
        order = torch.randperm(len(x), generator=self.generator).to(x.device)
        return self._encode(self.encoder_k, x[order])[order.argsort()]

    def _update_key_encoder(self) -> None:
        for key, query in zip(self.encoder_k.parameters(), self.encoder_q.parameters(), strict=True):
            key.lerp_(query.detach(), 1 - self.encoder_momentum)

    @torch.no_grad()
    def _enqueue(self, keys: torch.Tensor) -> None:
        start = int(self.queue_ptr)
        self.queue[:, start : start + len(keys)] = keys.T
        self.queue_ptr[0] = (start + len(keys)) % self.queue.shape[1]


def load_train_images(data_dir: str, sample: Dict[str, torch.Tensor]) -> torch.Tensor:
    """Loads the train split and makes sure that no validation image of the sample is in it."""
    images = load_split(data_dir, train=True).data
    shared = hash_images(images) & hash_images(sample['validation.image'])
    if shared:
        raise RuntimeError(f'{len(shared)} validation images of the sample are among the pretraining images.')
    return images


def hash_images(images: torch.Tensor) -> Set[bytes]:
    return {hashlib.sha256(image.tobytes()).digest() for image in images.numpy()}


def load_sample(path: str) -> Dict[str, torch.Tensor]:
    if not os.path.isfile(path):
        raise FileNotFoundError(f'No sample at {path!r}: write it by scripts/make_sample.py first.')
    return load_file(path)


@torch.no_grad()
def extract_features(encoder: nn.Module, images: torch.Tensor, device: str) -> torch.Tensor:
    """Returns the pooled backbone features, i.e. what comes before the head, of uint8 images."""
    was_training = encoder.training
    encoder.eval()
    features = []
    for part in images.split(500):
        x = F.interpolate(part.unsqueeze(1).float().to(device) / 255, size=IMAGE_SIZE, mode='bilinear')
        features.append(encoder.forward_head(encoder.forward_features(normalise(x)), pre_logits=True).cpu())
    encoder.train(was_training)
    return torch.cat(features)


def knn_top1(
    bank: torch.Tensor,
    bank_labels: torch.Tensor,
    queries: torch.Tensor,
    query_labels: torch.Tensor,
) -> float:
    """Top-1 per cent of cosine kNN in which a neighbour's vote weighs exp(similarity / 0.07)."""
    similarity = F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T
    nearest, indices = similarity.topk(KNN_NEIGHBOURS, dim=1)
    votes = torch.zeros(len(queries), int(bank_labels.max()) + 1)
    votes.scatter_add_(1, bank_labels[indices], (nearest / KNN_TEMPERATURE).exp())
    return (votes.argmax(dim=1) == query_labels).float().mean().item() * 100


def score_encoder(encoder: nn.Module, sample: Dict[str, torch.Tensor], device: str) -> float:
    bank, queries = (extract_features(encoder, sample[f'{part}.image'], device) for part in ('train', 'validation'))
    return knn_top1(bank, sample['train.label'], queries, sample['validation.label'])


def score_random(sample: Dict[str, torch.Tensor], seed: int, device: str) -> float:
    # One untrained network scores several points better or worse than another, so the baseline is a mean over seeds.
    scores = []
    for offset in range(NUM_RANDOM):
        torch.manual_seed(seed + offset)
        scores.append(score_encoder(create_encoder().to(device), sample, device))
    _logger.info('random networks, kNN top-1: ' + ', '.join(f'{score:.1f}' for score in scores))
    return sum(scores) / len(scores)


def score_pixels(sample: Dict[str, torch.Tensor]) -> float:
    bank, queries = (sample[f'{part}.image'].flatten(1).float() for part in ('train', 'validation'))
    return knn_top1(bank, sample['train.label'], queries, sample['validation.label'])


def iterate_batches(images: torch.Tensor, batch_size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    # The last, smaller batch is left out: the queue takes whole batches only.
    order = torch.randperm(len(images), generator=generator)
    for start in range(0, len(images) - batch_size + 1, batch_size):
        yield images[order[start : start + batch_size]]


def train_epoch(
    model: MoCo,
    batches: Iterator[torch.Tensor],
    augment: Augment,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    device: str,
) -> float:
    """Trains on every batch once and returns the mean loss."""
    model.train()
    losses: List[float] = []
    for images in batches:
        images = images.to(device)
        loss = model(augment(images), augment(images))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    mean = sum(losses) / len(losses)
    if not math.isfinite(mean):
        raise RuntimeError('The loss is not finite: try a smaller --lr.')
    return mean


def pretrain(model: MoCo, images: torch.Tensor, sample: Dict[str, torch.Tensor], args: argparse.Namespace) -> None:
    augment = Augment(args.min_crop, args.jitter, args.blur_prob, model.generator)
    optimizer = torch.optim.SGD(
        model.encoder_q.parameters(),
        lr=args.lr,
        momentum=0.9,
        weight_decay=args.weight_decay,
    )
    num_batches = len(images) // args.batch_size
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs * num_batches)
    for epoch in range(1, args.epochs + 1):
        start = time.perf_counter()
        batches = tqdm(
            iterate_batches(images, args.batch_size, model.generator),
            total=num_batches,
            desc=f'epoch {epoch}/{args.epochs}',
            leave=False,
            disable=None,  # shown on a terminal only
        )
        loss = train_epoch(model, batches, augment, optimizer, scheduler, args.device)
        message = f'epoch {epoch}/{args.epochs}: loss {loss:.4f}, {time.perf_counter() - start:.0f} s'
        if epoch % args.eval_every == 0:
            message += f', kNN top-1 {score_encoder(model.encoder_q, sample, args.device):.1f}'
        _logger.info(message)


def print_table(rows: List[Tuple[str, float]]) -> None:
    print(f'| features | kNN top-1 % (k={KNN_NEIGHBOURS}, cosine, weighted votes) |')
    print('|---|---:|')
    for name, score in rows:
        print(f'| {name} | {score:.1f} |')


def save_checkpoint(model: MoCo, score: float, args: argparse.Namespace) -> None:
    tensors = {f'module.{key}': value.cpu().contiguous() for key, value in model.state_dict().items()}
    metadata = {
        'method': 'MoCo v2',
        'architecture': ARCHITECTURE,
        'input_size': f'3 {IMAGE_SIZE} {IMAGE_SIZE}',
        'mean': '0.5 0.5 0.5',
        'std': '0.5 0.5 0.5',
        'knn_top1': f'{score:.1f}',
        'epochs': str(args.epochs),
        'seed': str(args.seed),
        'license': 'Apache-2.0',
        'data_license': f'Fashion-MNIST images: {LICENSE}',
    }
    write_atomically(args.output, to_bytes(tensors, metadata))
    _logger.info(f'Wrote {args.output}: {os.path.getsize(args.output)} bytes')


def main() -> None:
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    args = parse_args()
    sample = load_sample(args.sample)
    images = load_train_images(args.data_dir, sample)
    rows = [
        ('raw pixels', score_pixels(sample)),
        (f'random {ARCHITECTURE}, mean of {NUM_RANDOM} seeds', score_random(sample, args.seed, args.device)),
    ]
    # The initial weights come from the global generator: timm's model constructors take no explicit one.
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = MoCo(args.queue_size, args.encoder_momentum, args.temperature, args.bn_groups, generator).to(args.device)
    pretrain(model, images, sample, args)
    rows.append((f'MoCo v2 {ARCHITECTURE}, {args.epochs} epochs', score_encoder(model.encoder_q, sample, args.device)))
    print_table(rows)
    save_checkpoint(model, rows[-1][1], args)


if __name__ == '__main__':
    main()
