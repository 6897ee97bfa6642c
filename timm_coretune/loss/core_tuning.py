"""Core-tuning loss

Paper: `Unleashing the Power of Contrastive Self-Supervised Visual Models via Contrast-Regularized Fine-Tuning`
    - Yifan Zhang et al., NeurIPS 2021, https://arxiv.org/abs/2102.06605

Written from the paper. The released code has no licence and was not copied. Here, unlike there, gradients reach the
clean features, no forward pass is repeated for logging, and a loss that is not finite is not replaced.
"""

from typing import Any, Dict, Optional, Sequence, Tuple, Union, cast

import torch
import torch.nn as nn

from ..distributed import GlobalBatch, process_index_and_count
from ..mining.label_sets import jaccard_of_rows
from ..mixup import HardMixtures, HardPairMixup, MixupDraws
from ..timm_model import is_classifier_affine, resolve_num_features
from .base import Classifier, TaskLoss
from .focal_supcon import FocalSupConLoss
from .parts.cross_entropy import finite, infinite_again
from .parts.projection import ProjectionHead, check_widths

# arguments of CoreTuningLoss for anchor pixels. Hardest positives fall on few outliers there (docs/concentration.md)
FOR_PIXELS: Dict[str, Any] = {'smooth': 'negative', 'smooth_weight': 0.3}
PARTS = {'both': ('positive', 'negative'), 'positive': ('positive',), 'negative': ('negative',), 'none': ()}


class CoreTuningLoss(TaskLoss):
    """Soft-target cross-entropy over a batch and its mixtures + contrast_weight x focal contrastive loss.

    A classifier is affine in its features, so the logits of mixtures are mixed from the logits of the clean batch. The
    cross-entropy is linear in the target. Mixed features and mixed targets are therefore never computed. A classifier
    that is not affine, such as the MLP of CAFormer and ConvFormer, classifies the mixed features instead. Tasks find
    out by themselves which it is. In a loop of your own, pass `classifier=` if yours is not affine.

    A logit of -inf excludes a class. A mixture excludes the classes that either of its two rows excludes. Its loss is
    infinite if its target has a share of such a class.

    With multi_label, images have several labels or none. Label sets take the place of classes in mining (see
    `mining.label_sets`) and contrast (see `FocalSupConLoss`). Multi-hot targets are mixed, and the
    classification_loss takes the place of the cross-entropy. An image that shares a label with all others has no
    semi-hard negative. The image itself takes its place, unless no image of the batch has one.

    With several processes, pairs are mined over the rows of all, and each process averages over its own anchors. The
    gradients that DistributedDataParallel averages are then those of one process with the global batch. Gradient
    accumulation does not enlarge the batch that is contrasted; `CachedStep` does.

    Args:
        num_features: Width D of the pre-logits features: `model.head_hidden_size` if the model has it, else
            `model.num_features`. Or the model itself, which tells it.
        contrast_weight: Weight of the contrastive loss, >= 0. With 0 there is no projection head.
        mixup_alpha: Parameter alpha of Beta(alpha, alpha), from which mixing shares are drawn, > 0.
        temperature: Temperature of the contrastive loss, which divides cosine similarities, > 0.
        projection_dim: Width P of the embedding that the contrastive loss compares.
        label_smoothing: Share of a class index target that is spread evenly over all classes, in [0, 1). Soft targets
            are used as they are.
        gather: Mine and contrast over the rows of all processes. Otherwise each process uses only its own rows.
        min_positive_lam: Least share of the hardest positive in its mixture, in [0, 1]. The paper uses 0.
        min_negative_lam: Least share of the random negative in its mixture, in [0, 1]. The paper uses 0.8.
        positive_candidates: Number of random images of the class among which the hardest positive is searched, >= 0.
            0 searches all of them, as in the paper. 1 takes a random one.
        smooth: Which mixtures the classifier learns: 'both' as in the paper, 'positive', 'negative' or 'none'.
        smooth_weight: Weight of the mean cross-entropy of the mixtures beside that of the clean batch, > 0. When None,
            the loss is the mean over all clean rows and mixtures, as in the paper.
        mixtures: Which mixtures enter the contrast: 'both' as in the paper, 'positive', 'negative' or 'none'. With
            'none', smooth 'none' and focal False the loss is cross-entropy + SupCon.
        focal: Weight each positive by 1 minus its predicted probability.
        uneven_batches: Processes may hold batches of different sizes. These are exchanged in every step, which waits
            for the device. When False, sizes must be equal, as they are when the loader drops the last batch.
        class_weight: Weight of each class in the cross-entropy of clean and mixed images (C,). See TaskLoss.
        generator: Source of all random draws. When None, a new one on the CPU, seeded from torch's global seed. With
            several processes it needs the same seed on all of them, since each uses its part of the same draws.
        multi_label: Images may have several labels or none. Targets are multi-hot rows (B, C) in [0, 1].
        classification_loss: The loss on the labels in place of the cross-entropy, see TaskLoss. It gets the mixed
            targets of mixtures too.

    Raises:
        ValueError: An argument is out of its range.

    Examples:

        ```python
        criterion = CoreTuningLoss(model)  # its projection head has parameters: give them to the optimizer
        feature_map = model.forward_features(images)
        features = model.forward_head(feature_map, pre_logits=True)
        loss = criterion(features, model.get_classifier()(features), target)
        ```
    """

    contrasts = True

    def __init__(
        self,
        num_features: Union[int, nn.Module],
        contrast_weight: float = 0.1,
        mixup_alpha: float = 1.0,
        temperature: float = 0.07,
        projection_dim: int = 256,
        label_smoothing: float = 0.0,
        gather: bool = True,
        min_positive_lam: float = 0.0,
        min_negative_lam: float = 0.8,
        focal: bool = True,
        uneven_batches: bool = False,
        generator: Optional[torch.Generator] = None,
        positive_candidates: int = 0,
        smooth: str = 'both',
        smooth_weight: Optional[float] = None,
        mixtures: str = 'both',
        class_weight: Optional[Sequence[float]] = None,
        multi_label: bool = False,
        classification_loss: Optional[nn.Module] = None,
    ):
        super().__init__(
            gather, uneven_batches, label_smoothing, generator, class_weight, multi_label, classification_loss
        )
        num_features = resolve_num_features(num_features)
        check_widths(num_features, projection_dim)
        if not contrast_weight >= 0.0:
            raise ValueError(f'Expected contrast_weight >= 0, got {contrast_weight}. 0 switches the contrast off.')
        for name, parts in (('smooth', smooth), ('mixtures', mixtures)):
            if parts not in PARTS:
                raise ValueError(f'Expected {name} to be one of {", ".join(PARTS)}, got {parts!r}.')
        if smooth_weight is not None and not smooth_weight > 0.0:
            raise ValueError(f"Expected smooth_weight > 0, got {smooth_weight}. smooth='none' learns no mixtures.")
        self.num_features = num_features
        self.contrast_weight = contrast_weight
        self.smooth = smooth
        self.smooth_weight = smooth_weight
        self.mixtures = mixtures
        self.mixup = HardPairMixup(
            mixup_alpha,
            min_positive_lam,
            min_negative_lam,
            generator=self.generator,
            positive_candidates=positive_candidates,
        )
        self.mixup.mixup_enabled = bool(PARTS[smooth] or (contrast_weight and PARTS[mixtures]))
        self.contrast = FocalSupConLoss(temperature, focal=focal)
        # a parameter that gets no gradient stalls DistributedDataParallel
        self.projector = ProjectionHead(num_features, projection_dim) if contrast_weight else None

    def attach(self, model: nn.Module) -> None:
        """Find out whether the classifier of the model is affine."""
        self.requires = () if is_classifier_affine(model, cast(int, self.num_features)) else ('classifier',)

    def extra_repr(self) -> str:
        return f'contrast_weight={self.contrast_weight}, label_smoothing={self.label_smoothing}, mixup={self.mixup}'

    def prepare(
        self,
        batch_size: int,
        device: torch.device,
        rows_per_image: int = 1,
    ) -> Tuple[GlobalBatch, Optional[MixupDraws]]:
        """The place of the rows of this process among those of all, and the random draws for their mixtures.

        Image b of process r uses draws b * num_processes + r, which are also its draws in a single process that reads
        the same data.
        """
        (batch,) = super().prepare(batch_size, device, rows_per_image)
        if not self.mixup.mixup_enabled:
            return batch, None
        _, num_processes = process_index_and_count()
        draws = self.mixup.draw(num_processes * max(batch.sizes))
        return batch, MixupDraws(*map(batch.own_share, draws)).to(device)

    def compute(
        self,
        features: torch.Tensor,
        logits: torch.Tensor,
        target: torch.Tensor,
        *prepared: Any,
        clean_loss: Optional[torch.Tensor] = None,
        classifier: Optional[Classifier] = None,
        **further: Any,
    ) -> Dict[str, torch.Tensor]:
        """Compute the losses from the batch and the draws that `prepare` returned. Without draws nothing is mixed.

        With a classifier, which maps features (N, D) to logits (N, C), the mixed features are classified by it.
        Without one the logits are mixed, which is the same if the classifier is affine.
        """
        batch, draws = prepared
        self.check_given(classifier=classifier)
        columns = {'target': target if target.ndim == 2 else target.long()}
        if self.projector is not None:
            hidden, columns['unit'] = self.projector(features)
        embeds_mixtures = self.projector is not None and draws is not None and bool(PARTS[self.mixtures])
        # One process mixes the outputs of the projector's first layer, so as not to compute it for mixtures.
        # Several would have to exchange them too, so they mix the features, which they exchange for mining anyway.
        mixes_hidden = embeds_mixtures and batch.world_size == 1
        if draws is not None:
            needs_grad = classifier is not None or (embeds_mixtures and not mixes_hidden)
            columns['features'] = features if needs_grad else features.detach()
            if classifier is None and PARTS[self.smooth]:
                columns['logits'] = logits
        if mixes_hidden:
            columns['hidden'] = hidden
        everyone = batch.gather_together(**columns)
        label = self.labels_of(everyone['target'])
        mixtures, mixed_logits = None, None
        if draws is not None:
            order, own = batch.reading_order(features.device), batch.own_rows(features.device)
            mixtures = self.mixup.pair(everyone['features'], label, draws.as_numbers(), anchor=own, order=order)
            if PARTS[self.smooth]:
                parts = [getattr(mixtures, part) for part in PARTS[self.smooth]]
                if classifier is None:
                    all_logits = finite(everyone['logits'])
                    mixed_logits = [mixture.mix(all_logits) for mixture in parts]
                else:
                    mixed = classifier(torch.cat([mixture.mix(everyone['features']) for mixture in parts]))
                    mixed_logits = [finite(rows) for rows in mixed.tensor_split(len(parts))]
        clean_loss = self.cross_entropy(logits, target, label, batch, clean_loss)
        task_loss = clean_loss
        if mixtures is not None and mixed_logits is not None:
            mixed_loss = self._mixed_nll if self.classification_loss is None else self._mixed_label_loss
            task_loss = self._weigh(clean_loss, *mixed_loss(mixed_logits, everyone['target'], label, batch, mixtures))
        if self.projector is None:
            return {'loss': task_loss, 'task_loss': task_loss}
        contrast_loss = self._contrast_loss(self.projector, everyone, label, batch, mixtures)
        return {
            'loss': task_loss + self.contrast_weight * contrast_loss,
            'task_loss': task_loss,
            'contrast_loss': contrast_loss,
        }

    def task_state(self) -> Dict[str, Any]:
        state: Dict[str, Any] = {'generator': self.generator.get_state()}
        if self.projector is not None:
            state['projector'] = self.projector.state_dict()
        return state

    def load_task_state(self, state: Dict[str, Any], strict: bool = True) -> None:
        if strict and (self.projector is None) != ('projector' not in state):
            raise RuntimeError(
                'One of checkpoint and task has a projection head and the other has not. Resume with the '
                'contrast_weight the checkpoint was trained with, which is 0 for those without.'
            )
        if self.projector is not None and 'projector' in state:
            self.projector.load_state_dict(state['projector'], strict=strict)
        if 'generator' in state:
            self.generator.set_state(state['generator'])

    def _mixed_nll(
        self,
        mixed_logits: Sequence[torch.Tensor],
        all_target: torch.Tensor,
        label: torch.Tensor,
        batch: GlobalBatch,
        mixtures: HardMixtures,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """The sum over parts of the mean cross-entropy of mixtures, and the number of parts that exist."""
        left_out = label[batch.own] < 0
        total, num_parts = mixed_logits[0].new_zeros(()), torch.zeros_like(label[:1]).sum()
        for name, mixed_rows in zip(PARTS[self.smooth], mixed_logits, strict=True):
            mixture = getattr(mixtures, name)
            log_p = mixed_rows.log_softmax(dim=-1)
            # cross-entropy is linear in the target
            mixed_nll = torch.lerp(
                self.nll(log_p, all_target.index_select(0, mixture.other)),
                self.nll(log_p, all_target.index_select(0, mixture.index)),
                mixture.lam.to(log_p.dtype),
            )
            # rows that take no part have no mixtures; a batch of one class has no semi-hard negatives
            missing = left_out if name == 'positive' else left_out | ~mixtures.has_negative
            total = total + infinite_again(mixed_nll).masked_fill(missing, 0.0).sum()
            num_parts = num_parts + ((label >= 0).any() if name == 'positive' else mixtures.has_negative.any())
        return batch.mean(total, label), num_parts

    def _mixed_label_loss(
        self,
        mixed_logits: Sequence[torch.Tensor],
        all_target: torch.Tensor,
        label: torch.Tensor,
        batch: GlobalBatch,
        mixtures: HardMixtures,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """The same for the classification_loss."""
        soft = self.soft_target(all_target, mixed_logits[0])
        mixed_loss, num_parts = mixed_logits[0].new_zeros(()), torch.zeros_like(label[:1]).sum()
        for name, mixed_rows in zip(PARTS[self.smooth], mixed_logits, strict=True):
            part_loss = self.label_loss(mixed_rows, getattr(mixtures, name).mix(soft), label, batch)
            # a missing semi-hard negative is the anchor itself; there is no such part if all of them are missing
            exists = mixtures.has_negative if name == 'negative' else torch.ones_like(mixtures.has_negative)
            if label.ndim == 2:  # with one label an image, either all images of all processes have one or none has
                exists = batch.gather(exists)
            mixed_loss = mixed_loss + part_loss.masked_fill(~exists.any(), 0.0)
            num_parts = num_parts + exists.any()
        return mixed_loss, num_parts

    def _weigh(self, clean_loss: torch.Tensor, mixed_loss: torch.Tensor, num_parts: torch.Tensor) -> torch.Tensor:
        """The loss of clean rows and mixtures, of which there are num_parts (0, 1 or 2) for each clean row."""
        if self.smooth_weight is None:
            return (clean_loss + mixed_loss) / (1 + num_parts)
        return clean_loss + self.smooth_weight * mixed_loss / num_parts.clamp(min=1)

    def _contrast_loss(
        self,
        projector: ProjectionHead,
        everyone: Dict[str, torch.Tensor],
        label: torch.Tensor,
        batch: GlobalBatch,
        mixtures: Optional[HardMixtures],
    ) -> torch.Tensor:
        extras: Dict[str, torch.Tensor] = {}
        parts = PARTS[self.mixtures] if mixtures is not None else ()
        if parts:
            name = 'hidden' if 'hidden' in everyone else 'features'
            _, unit = projector(**{name: torch.cat([getattr(mixtures, part).mix(everyone[name]) for part in parts])})
            extras = dict(zip(parts, unit.tensor_split(len(parts)), strict=True))
        positive_weight = None
        if self.multi_label and mixtures is not None:
            positive_weight = jaccard_of_rows(label[batch.own], label[mixtures.positive.index])
        per_anchor = self.contrast.per_anchor(
            everyone['unit'],
            label,
            unit_positive=extras.get('positive'),
            unit_negative=extras.get('negative'),
            has_negative=None if mixtures is None else mixtures.has_negative,
            anchor=batch.own,
            positive_weight=positive_weight,
        )
        return batch.mean(per_anchor.sum(), label)
