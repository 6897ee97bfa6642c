"""Hard pair mixup

Mixtures of features instead of pixels. For every image of a batch: a hard positive, of its hardest positive and its
hardest negative, and a semi-hard negative, of the image itself and a random negative.

Paper: `Unleashing the Power of Contrastive Self-Supervised Visual Models via Contrast-Regularized Fine-Tuning`
    - Yifan Zhang et al., NeurIPS 2021, https://arxiv.org/abs/2102.06605

Everything mixed here (features, logits, targets, the output of an affine layer) is linear in its rows, so one `Mixture`
of row indices and shares serves them all and nothing is computed twice.
"""

from typing import NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F

from .checks import check_features, check_target
from .mining import at_least_float32, hard_label, select_hard_pairs


class Mixture(NamedTuple):
    """Which two rows are mixed, and how: `lam * x[index] + (1 - lam) * x[other]`.

    Attributes:
        index: Row that lam weighs (B,) int64.
        other: Row that 1 - lam weighs (B,) int64.
        lam: Share of `index`, in [0, 1] (B,) float.
    """

    index: torch.Tensor
    other: torch.Tensor
    lam: torch.Tensor

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        """Mixed rows (B, ...) of x (N, ...), differentiable in x."""
        lam = self.lam.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        return torch.lerp(x.index_select(0, self.other), x.index_select(0, self.index), lam)


class MixupDraws(NamedTuple):
    """The random numbers of one batch, each (B,) float32.

    They are drawn outside a compiled region and passed in, as torch ops with `generator=` break a full graph.

    Attributes:
        positive_lam: Share of the hardest positive in the hard positive.
        negative_lam: Share of the random negative in the semi-hard negative.
        random_negative: Uniform in [0, 1), selects the random negative.
    """

    positive_lam: torch.Tensor
    negative_lam: torch.Tensor
    random_negative: torch.Tensor


class HardMixtures(NamedTuple):
    """The two mixtures of every anchor.

    Attributes:
        positive: Hard positive, of the hardest positive and the hardest negative.
        negative: Semi-hard negative, of the random negative and the anchor.
        has_negative: False where no other class is in the batch: the hard positive is pure and there is no semi-hard
            negative (B,) bool.
    """

    positive: Mixture
    negative: Mixture
    has_negative: torch.Tensor


def sample_beta(alpha: float, size: int, generator: Optional[torch.Generator] = None) -> torch.Tensor:
    """Draw from Beta(alpha, alpha) with an explicit generator, which torch.distributions cannot (size,) float32.

    The share of one of two Gamma(alpha) draws, in logarithms, as both underflow at a small alpha: log Gamma(alpha) is
    log Gamma(alpha + 1) + log(U) / alpha for U uniform (Marsaglia and Tsang 2000).
    """
    device = 'cpu' if generator is None else generator.device
    if alpha == 1.0:
        return torch.rand(size, generator=generator, device=device)
    concentration = torch.full((2, size), alpha + 1.0, dtype=torch.float64, device=device)
    uniform = torch.rand(2, size, dtype=torch.float64, generator=generator, device=device)
    log_gamma = torch._standard_gamma(concentration, generator=generator).log() + uniform.log() / alpha
    return (log_gamma[0] - log_gamma[1]).sigmoid().float()


class HardPairMixup:
    """Mixes the features of hard pairs; called like timm's Mixup, but with features instead of pixels.

    As in timm, setting `mixup_enabled` to False turns it off. Unlike in timm, lam does not always weigh the image
    itself: it weighs the hardest positive in a hard positive and the random negative in a semi-hard negative.

    Draws are made on the generator's device, the CPU by default, so that a run draws the same numbers on any device;
    three floats an image travel, without synchronisation.

    Args:
        mixup_alpha: Both shares are drawn from Beta(alpha, alpha), > 0.
        min_positive_lam: Least share m of the hardest positive in [0, 1]; a draw a becomes m + (1 - m) a.
        min_negative_lam: Least share of the random negative in [0, 1]; smaller draws are clipped to it.
        generator: Source of all draws. A new one, seeded from torch's global seed, when None.
        num_classes: Needed only to call the object with class indices, which it makes one-hot.

    Raises:
        ValueError: An argument is out of its range.

    Examples:

        ```python
        mixup = HardPairMixup(num_classes=10)
        features, target = mixup(features, target)  # (3B, D), (3B, 10): clean, hard positives, semi-hard negatives
        ```
    """

    def __init__(
        self,
        mixup_alpha: float = 1.0,
        min_positive_lam: float = 0.0,
        min_negative_lam: float = 0.8,
        generator: Optional[torch.Generator] = None,
        num_classes: Optional[int] = None,
    ):
        if not mixup_alpha > 0.0:
            raise ValueError(
                f'Expected mixup_alpha > 0, the parameter of a Beta distribution, got {mixup_alpha}. '
                'To switch mixtures off set mixup_enabled to False.'
            )
        for name, lam in (('min_positive_lam', min_positive_lam), ('min_negative_lam', min_negative_lam)):
            if not 0.0 <= lam <= 1.0:
                raise ValueError(f'Expected {name} in [0, 1], the least share of a mixture, got {lam}.')
        self.mixup_alpha = mixup_alpha
        self.min_positive_lam = min_positive_lam
        self.min_negative_lam = min_negative_lam
        self.generator = generator if generator is not None else torch.Generator().manual_seed(torch.initial_seed())
        self.num_classes = num_classes
        self.mixup_enabled = True

    def __repr__(self) -> str:
        return (
            f'{type(self).__name__}(mixup_alpha={self.mixup_alpha}, min_positive_lam={self.min_positive_lam}, '
            f'min_negative_lam={self.min_negative_lam})'
        )

    def draw(self, batch_size: int, device: Optional[torch.device] = None) -> MixupDraws:
        """Advance the generator by one batch and return its random numbers on device."""
        positive_lam = sample_beta(self.mixup_alpha, batch_size, self.generator)
        positive_lam = self.min_positive_lam + (1.0 - self.min_positive_lam) * positive_lam
        negative_lam = sample_beta(self.mixup_alpha, batch_size, self.generator).clamp(min=self.min_negative_lam)
        random_negative = torch.rand(batch_size, generator=self.generator, device=self.generator.device)
        draws = (positive_lam, negative_lam, random_negative)
        return MixupDraws(*(draw.to(device, non_blocking=True) for draw in draws))

    def pair(
        self,
        features: torch.Tensor,
        label: torch.Tensor,
        draws: MixupDraws,
        anchor: Optional[torch.Tensor] = None,
        order: Optional[torch.Tensor] = None,
    ) -> HardMixtures:
        """Mine a batch and say what is to be mixed. Arguments as in `mining.select_hard_pairs`."""
        hard_positive, hard_negative, random_negative, has_negative = select_hard_pairs(
            features, label, draws.random_negative, anchor=anchor, order=order
        )
        own = torch.arange(features.shape[0], device=features.device) if anchor is None else anchor
        positive_lam = draws.positive_lam.masked_fill(~has_negative, 1.0)
        return HardMixtures(
            positive=Mixture(hard_positive, hard_negative, positive_lam),
            negative=Mixture(random_negative, own, draws.negative_lam),
            has_negative=has_negative,
        )

    def __call__(self, x: torch.Tensor, target: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Append the mixtures of a batch to it.

        Args:
            x: Features of any scale and floating dtype (B, D).
            target: Class indices (B,) or soft targets (B, C).

        Returns:
            Features (3B, D) in the dtype of x and soft targets (3B, C), float32 or better: the clean rows, the hard
            positives, the semi-hard negatives. When the batch holds one class only it has no semi-hard negatives and
            the third part repeats the clean rows. With `mixup_enabled` False only the clean rows.

        Raises:
            ValueError: x is no (B, D) matrix, target does not fit it, or class indices came without num_classes.
        """
        check_features(x)
        check_target(target, x.shape[0], self.num_classes)
        if target.ndim == 1:
            if self.num_classes is None:
                raise ValueError(
                    'Class indices need HardPairMixup(num_classes=...) to become soft targets. Pass it, or pass soft '
                    f'targets ({x.shape[0]}, num_classes).'
                )
            soft_target = F.one_hot(target.long(), self.num_classes).to(torch.float32)
        else:
            soft_target = at_least_float32(target)
        if not self.mixup_enabled:
            return x, soft_target
        pairs = self.pair(x, hard_label(target), self.draw(x.shape[0], x.device))
        negative = pairs.negative
        return (
            torch.cat([x, pairs.positive.mix(x), negative.mix(x)]),
            torch.cat([soft_target, pairs.positive.mix(soft_target), negative.mix(soft_target)]),
        )
