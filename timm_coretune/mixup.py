"""Hard pair mixup

Mixes features instead of pixels. Every image of a batch gets two mixtures. The hard positive mixes the hardest positive
(the least similar image of the same class) and the hardest negative (the most similar image of another class). The
semi-hard negative mixes a random image of another class and the image itself.

Paper: `Unleashing the Power of Contrastive Self-Supervised Visual Models via Contrast-Regularized Fine-Tuning`
    - Yifan Zhang et al., NeurIPS 2021, https://arxiv.org/abs/2102.06605

A `Mixture` keeps row indices and shares only. It can mix features, targets and the outputs of an affine layer such as
logits: the logits of mixed features equal the mixed logits, so they are not computed again.
"""

import itertools
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Tuple
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import library

from .checks import check_features, check_not_recomputed, check_target
from .distributed import copy_to
from .mining import at_least_float32, hard_label, select_hard_pairs
from .mining.label_sets import select_hard_pairs_of_sets


class Mixture(NamedTuple):
    """Which two rows are mixed, and how: `lam * x[index] + (1 - lam) * x[other]`.

    Attributes:
        index: Row with the weight lam (B,) int64.
        other: Row with the weight 1 - lam (B,) int64.
        lam: Share of the row `index`, in [0, 1] (B,) float.
    """

    index: torch.Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    other: torch.Tensor
    lam: torch.Tensor

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        """Mix the rows of x (N, ...) into (B, ...), differentiable in x."""
        lam = self.lam.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        return torch.lerp(x.index_select(0, self.other), x.index_select(0, self.index), lam)


class MixupDraws(NamedTuple):
    """The random numbers of one batch, each (B,) float32 unless stated.

    They are drawn outside a compiled region and passed into it, as torch.compile cannot trace ops with `generator=`.

    Attributes:
        positive_lam: Share of the hardest positive in the hard positive.
        negative_lam: Share of the random negative in the semi-hard negative.
        random_negative: Uniform in [0, 1); selects the random negative.
        positive_candidates: Uniform in [0, 1); selects the K candidates of the hardest positive (B, K). K is 0 if the
            whole class is searched.
    """

    positive_lam: torch.Tensor
    negative_lam: torch.Tensor
    random_negative: torch.Tensor
    positive_candidates: torch.Tensor

    def to(self, device: Optional[torch.device]) -> 'MixupDraws':
        """Copy them to a device, all at once and without waiting for it."""
        if device is None or device == self.positive_lam.device:
            return self
        rows = torch.cat([torch.stack(self[:3]), self.positive_candidates.T])
        positive_lam, negative_lam, random_negative, *candidates = copy_to(rows, device).unbind()
        columns = torch.stack(candidates, dim=1) if candidates else positive_lam.new_empty(rows.shape[1], 0)
        return MixupDraws(positive_lam, negative_lam, random_negative, columns)

    def as_bits(self) -> 'MixupDraws':
        """The same bits as int32. Wrappers such as Lightning Fabric and FSDP round floats that a module is given."""
        return MixupDraws(*(draw.view(torch.int32) for draw in self))

    def as_numbers(self) -> 'MixupDraws':
        """The float32 numbers, from `as_bits` or as they are."""
        return MixupDraws(*(draw if draw.is_floating_point() else draw.view(torch.float32) for draw in self))


def protect_draws(prepared: Iterable[Any]) -> List[Any]:
    """Turn the draws among the arguments of a module into bits, before a wrapper of the module gets them."""
    return [argument.as_bits() if isinstance(argument, MixupDraws) else argument for argument in prepared]


class HardMixtures(NamedTuple):
    """The two mixtures of every anchor.

    Attributes:
        positive: Hard positives, mixed from the hardest positive and the hardest negative.
        negative: Semi-hard negatives, mixed from a random negative and the anchor.
        has_negative: Whether the batch has an image of another class (B,) bool. Where it has none, the hard positive
            is the hardest positive alone, and the semi-hard negative, which is the anchor itself, must not be used.
    """

    positive: Mixture
    negative: Mixture
    has_negative: torch.Tensor


def sample_beta(alpha: float, size: int, generator: Optional[torch.Generator] = None) -> torch.Tensor:
    """Draw from Beta(alpha, alpha) with an explicit generator, which torch.distributions cannot do (size,) float32.

    For two draws X and Y from Gamma(alpha), X / (X + Y) is a draw from Beta(alpha, alpha). X and Y underflow at a small
    alpha, so their logarithms are computed: log X is log Z + log(U) / alpha, for Z from Gamma(alpha + 1) and U uniform
    in [0, 1) (Marsaglia and Tsang 2000).
    """
    device = 'cpu' if generator is None else generator.device
    if alpha == 1.0:
        return torch.rand(size, generator=generator, device=device)
    concentration = torch.full((2, size), alpha + 1.0, dtype=torch.float64, device=device)
    uniform = torch.rand(2, size, dtype=torch.float64, generator=generator, device=device)
    log_gamma = torch._standard_gamma(concentration, generator=generator).log() + uniform.log() / alpha
    return (log_gamma[0] - log_gamma[1]).sigmoid().float()


# torch.compile cannot trace draws from an explicit generator. In a compiled graph an operator makes them, which finds
# the object with the generator by its number.
_numbers = itertools.count()
_mixups: 'WeakValueDictionary[int, HardPairMixup]' = WeakValueDictionary()
library.define(
    'timm_coretune::draw_mixtures',
    '(int number, SymInt size, int positive_candidates, str device) -> (Tensor, Tensor, Tensor, Tensor)',
    tags=(torch.Tag.nondeterministic_seeded,),
)


@library.impl('timm_coretune::draw_mixtures', 'default')
def _draw_mixtures(number: int, size: int, positive_candidates: int, device: str) -> Tuple[torch.Tensor, ...]:
    return tuple(_mixups[number].draw_on_own_device(size))


@library.register_fake('timm_coretune::draw_mixtures')
def _draw_nothing(number: int, size: int, positive_candidates: int, device: str) -> Tuple[torch.Tensor, ...]:
    shapes = ((size,), (size,), (size,), (size, positive_candidates))
    return tuple(torch.empty(shape, device=device) for shape in shapes)


class HardPairMixup:
    """Mixes the features of hard pairs. It is called like timm's Mixup, but with features instead of pixels.

    As in timm, setting `mixup_enabled` to False turns it off. In timm lam is the share of the image itself. Here it is
    the share of the hardest positive in a hard positive, and of the random negative in a semi-hard negative.

    Numbers are drawn on the generator's device, the CPU by default, so a run draws the same numbers on any device.
    Three floats per image, and one for each positive candidate, are copied to the device of the features, at once and
    without synchronisation.

    Args:
        mixup_alpha: Parameter alpha of Beta(alpha, alpha), from which both shares are drawn, > 0.
        min_positive_lam: Least share of the hardest positive, in [0, 1]. With the least share m, a draw a becomes
            m + (1 - m) * a.
        min_negative_lam: Least share of the random negative, in [0, 1]. Smaller draws are raised to it.
        positive_candidates: Number K of random images of the class among which the hardest positive is searched, >= 0.
            0 searches all of the class, as in the paper. 1 takes a random positive. A large class has a few outliers
            that are the least similar image of most others; a small K spreads the choice.
        generator: Source of all random numbers. None creates one, seeded from torch's global seed.
        num_classes: Number of classes. Needed only to call the object with class indices, which become one-hot.

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
        positive_candidates: int = 0,
    ):
        if not mixup_alpha > 0.0:
            raise ValueError(
                f'Expected mixup_alpha > 0, the parameter of a Beta distribution, got {mixup_alpha}. '
                'To switch mixtures off set mixup_enabled to False.'
            )
        for name, lam in (('min_positive_lam', min_positive_lam), ('min_negative_lam', min_negative_lam)):
            if not 0.0 <= lam <= 1.0:
                raise ValueError(f'Expected {name} in [0, 1], the least share of a mixture, got {lam}.')
        if positive_candidates < 0:
            raise ValueError(
                f'Expected positive_candidates >= 0, got {positive_candidates}. 0 searches all images of the class.'
            )
        self.mixup_alpha = mixup_alpha
        self.min_positive_lam = min_positive_lam
        self.min_negative_lam = min_negative_lam
        self.generator = generator if generator is not None else torch.Generator().manual_seed(torch.initial_seed())
        self.num_classes = num_classes
        self.positive_candidates = positive_candidates
        self.mixup_enabled = True
        self._register()

    def _register(self) -> None:
        self.number = next(_numbers)
        _mixups[self.number] = self

    def __setstate__(self, state: Dict[str, Any]) -> None:  # of a copy, which draws from its own generator
        self.__dict__.update(state)
        self._register()

    def __repr__(self) -> str:
        return (
            f'{type(self).__name__}(mixup_alpha={self.mixup_alpha}, min_positive_lam={self.min_positive_lam}, '
            f'min_negative_lam={self.min_negative_lam}, positive_candidates={self.positive_candidates})'
        )

    def draw(self, batch_size: int, device: Optional[torch.device] = None) -> MixupDraws:
        """Draw the random numbers of one batch and return them on a device. This advances the generator.

        Raises:
            RuntimeError: A backward pass is running, see `checks.check_not_recomputed`.
        """
        if torch.compiler.is_compiling():
            device_of_draws = str(self.generator.device)
            draws = torch.ops.timm_coretune.draw_mixtures(
                self.number, batch_size, self.positive_candidates, device_of_draws
            )
        else:
            draws = self.draw_on_own_device(batch_size)
        return MixupDraws(*draws).to(device)

    def draw_on_own_device(self, batch_size: int) -> MixupDraws:
        """Draw the random numbers of one batch, on the device of the generator."""
        check_not_recomputed()
        positive_lam = sample_beta(self.mixup_alpha, batch_size, self.generator)
        positive_lam = self.min_positive_lam + (1.0 - self.min_positive_lam) * positive_lam
        negative_lam = sample_beta(self.mixup_alpha, batch_size, self.generator).clamp(min=self.min_negative_lam)
        device = self.generator.device
        random_negative = torch.rand(batch_size, generator=self.generator, device=device)
        candidates = torch.rand(batch_size, self.positive_candidates, generator=self.generator, device=device)
        return MixupDraws(positive_lam, negative_lam, random_negative, candidates)

    def pair(
        self,
        features: torch.Tensor,
        label: torch.Tensor,
        draws: MixupDraws,
        anchor: Optional[torch.Tensor] = None,
        order: Optional[torch.Tensor] = None,
    ) -> HardMixtures:
        """Mine the hard pairs of a batch and return which rows to mix.

        Args:
            features: As for `mining.select_hard_pairs`.
            label: As for `mining.select_hard_pairs`, or label sets (N, C) as for `mining.label_sets`.
            draws: Random numbers of the batch, from `draw`.
            anchor: As for `mining.select_hard_pairs`.
            order: As for `mining.select_hard_pairs`.
        """
        select = select_hard_pairs if label.ndim == 1 else select_hard_pairs_of_sets
        hard_positive, hard_negative, random_negative, has_negative = select(
            features,
            label,
            draws.random_negative,
            anchor=anchor,
            order=order,
            positive_draw=draws.positive_candidates,
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
            Features (3B, D) in the dtype of x, and soft targets (3B, C) in float32 or better. Both hold the clean rows,
            then the hard positives, then the semi-hard negatives. If the batch has only one class, there are no
            semi-hard negatives and the third part repeats the clean rows. With `mixup_enabled` False only the clean
            rows are returned.

        Raises:
            ValueError: x has not the shape (B, D), target does not fit x, or target has class indices and num_classes
                is None.
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
