"""Core-tuning loss

Paper: `Unleashing the Power of Contrastive Self-Supervised Visual Models via Contrast-Regularized Fine-Tuning`
    - Yifan Zhang et al., NeurIPS 2021, https://arxiv.org/abs/2102.06605
Without mixtures and focal factor the contrastive term is SupCon
    - Prannay Khosla et al., NeurIPS 2020, https://arxiv.org/abs/2004.11362

Written from the papers. Unlike the released code of Core-tuning, which has no licence and was not copied, labels are
compared rather than hashed, clean features receive gradient, the mean is over the positives, anchors are the clean
images only, and nothing is run twice for a meter. A loss that is not finite is never replaced.
"""

from typing import Dict, Optional, Tuple

import torch
import torch.nn as nn

from .checks import check_features, check_target
from .distributed import GlobalBatch, process_index_and_count
from .mining import at_least_float32, hard_label, normalize
from .mixup import HardMixtures, HardPairMixup, Mixture, MixupDraws


class FocalSupConLoss(nn.Module):
    """Pulls images of one class together, weighting each positive by how badly it is predicted.

    With p_ij the softmax over A_i of v_i.v_j / temperature, the loss is -(1 - p_ij) log p_ij, averaged over the
    positives P_i of an anchor and then over all anchors. A_i is the batch but the anchor, and its own extra positive
    and negative; P_i is its class in the batch but the anchor, and its extra positive. An anchor without any positive
    counts 0. The factor (1 - p_ij) is differentiated. At chance the loss without it is near ln |A_i|.

    Positional arguments of the call are those of pytorch-metric-learning's losses: embeddings, then labels.

    Args:
        temperature: Divides the cosine similarity, > 0. Lower values look harder at the nearest images.
        focal: Weight positives by (1 - p_ij). Without it and without extras this is SupCon.

    Raises:
        ValueError: temperature is not positive.
    """

    def __init__(self, temperature: float = 0.07, focal: bool = True):
        super().__init__()
        if not temperature > 0.0:
            raise ValueError(f'Expected temperature > 0, it divides cosines, got {temperature}. The paper uses 0.07.')
        self.temperature = temperature
        self.focal = focal

    def extra_repr(self) -> str:
        return f'temperature={self.temperature}, focal={self.focal}'

    def forward(
        self,
        embedding: torch.Tensor,
        label: torch.Tensor,
        extra_positive: Optional[torch.Tensor] = None,
        extra_negative: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """
        Args:
            embedding: Embeddings of the anchors, of any scale; normalised here (B, P).
            label: Class indices of an integer dtype (B,), or soft targets (B, C), whose most probable class counts.
            extra_positive: One more positive for each anchor, not shared with the others (B, P).
            extra_negative: One more negative for each anchor, not shared with the others (B, P).

        Returns:
            Mean over the anchors in nats, a scalar of float32 or better. It is attached to the graph also when no
            anchor has a positive and it is 0.

        Raises:
            ValueError: Shapes or dtypes do not fit.
        """
        check_features(embedding, 'embedding')
        check_target(label, embedding.shape[0])
        for name, extra in (('extra_positive', extra_positive), ('extra_negative', extra_negative)):
            if extra is not None and extra.shape != embedding.shape:
                raise ValueError(f'Expected {name} {tuple(embedding.shape)}, one per anchor, got {tuple(extra.shape)}.')
        per_anchor = self.per_anchor(
            normalize(embedding),
            hard_label(label),
            None if extra_positive is None else normalize(extra_positive),
            None if extra_negative is None else normalize(extra_negative),
        )
        return per_anchor.mean()

    def per_anchor(
        self,
        unit: torch.Tensor,
        label: torch.Tensor,
        unit_positive: Optional[torch.Tensor] = None,
        unit_negative: Optional[torch.Tensor] = None,
        has_negative: Optional[torch.Tensor] = None,
        anchor: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """The loss of each anchor, on embeddings of unit length in float32 or better; nothing is checked.

        Args:
            unit: Embeddings of the batch (N, P).
            label: Class index of each, negative for those that take no part (N,) int64.
            unit_positive: Extra positive of each anchor (B, P).
            unit_negative: Extra negative of each anchor (B, P).
            has_negative: False for anchors whose extra negative does not exist (B,) bool.
            anchor: Rows of the batch that are anchors (B,) int64, all in order when None.

        Returns:
            Loss per anchor in nats, 0 for those that take no part (B,).
        """
        candidate = torch.arange(unit.shape[0], device=unit.device)
        anchor = candidate if anchor is None else anchor
        own = unit.index_select(0, anchor)
        own_label = label.index_select(0, anchor)
        hidden = (anchor[:, None] == candidate) | (label < 0)
        positive = (own_label[:, None] == label) & ~hidden
        if unit_positive is None:
            hidden = hidden & ~hidden.all(dim=1, keepdim=True)  # a softmax over nothing would be NaN
        with torch.autocast(device_type=unit.device.type, enabled=False):
            logits = [(own @ unit.T).masked_fill(hidden, float('-inf'))]
            positives = [positive]
            if unit_positive is not None:
                logits.append((own * unit_positive).sum(dim=-1, keepdim=True))
                positives.append(torch.ones_like(hidden[:, :1]))
            if unit_negative is not None:
                negative = (own * unit_negative).sum(dim=-1, keepdim=True)
                logits.append(
                    negative if has_negative is None else negative.masked_fill(~has_negative[:, None], float('-inf'))
                )
                positives.append(torch.zeros_like(hidden[:, :1]))
            positive = torch.cat(positives, dim=1)
            log_p = (torch.cat(logits, dim=1) / self.temperature).log_softmax(dim=1).masked_fill(~positive, 0.0)
            pair_loss = torch.expm1(log_p) * log_p if self.focal else -log_p
            per_anchor = pair_loss.sum(dim=1) / positive.sum(dim=1).clamp(min=1)
            return per_anchor.masked_fill(own_label < 0, 0.0)


class ProjectionHead(nn.Module):
    """Linear, ReLU, Linear: maps features to the space of the contrast. It is dropped after training.

    Args:
        num_features: Width D of the features and of the hidden layer.
        projection_dim: Width P of the embedding.
    """

    def __init__(self, num_features: int, projection_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(num_features, num_features)
        self.act = nn.ReLU(inplace=True)
        self.fc2 = nn.Linear(num_features, projection_dim)

    def forward(
        self,
        features: torch.Tensor,
        mixtures: Optional[HardMixtures] = None,
        batch: Optional[GlobalBatch] = None,
    ) -> torch.Tensor:
        """Embed features (B, D), and their mixtures if given, as unit vectors in float32 or better (B or 3B, P).

        The first layer is affine, so its output for a mixture of inputs is the same mixture of its outputs: the D x D
        product is paid for B rows. Mixture indices count the rows of the global batch.
        """
        hidden = self.fc1(features.to(self.fc1.weight.dtype))
        if mixtures is not None:
            all_hidden = batch.gather(hidden)
            hidden = torch.cat([hidden, mixtures.positive.mix(all_hidden), mixtures.negative.mix(all_hidden)])
        return normalize(self.fc2(self.act(hidden)))


class CoreTuningLoss(nn.Module):
    """Soft-target cross-entropy over a batch and its mixtures + contrast_weight x focal contrastive loss.

    The mixtures' logits are mixed from the logits of the clean batch, as a classifier is affine in its features, and
    the cross-entropy is linear in the target, so neither mixed features nor mixed targets are ever built.

    With several processes the pairs are mined over the rows of all, each process averages over its own anchors, and
    the gradient average of DistributedDataParallel is that of one process with the global batch. Gradient accumulation
    does not enlarge the batch that is contrasted.

    Args:
        num_features: Width D of the features before the classifier: `model.head_hidden_size` if the model has it, else
            `model.num_features`.
        contrast_weight: Weight of the contrastive loss, >= 0. 0 builds no projection head.
        mixup_alpha: Mixture shares are drawn from Beta(alpha, alpha), > 0.
        temperature: Divides the cosine similarity in the contrastive loss, > 0.
        projection_dim: Width P of the embedding that is contrasted.
        label_smoothing: Moves this share of a class index target to all classes evenly, in [0, 1). Soft targets are
            taken as they are.
        gather: Mine and contrast over all processes. Otherwise each process is on its own.
        min_positive_lam: Least share of the hardest positive in its mixture, in [0, 1]. 0 is the paper's.
        min_negative_lam: Least share of the random negative in its mixture, in [0, 1]. 0.8 is the paper's.
        focal: Weight positives by how badly they are predicted.
        uneven_batches: Processes may hold batches of different size. Their sizes are exchanged in every step, which
            synchronises with the device. Without it sizes must agree, as they do when the loader drops the last batch.
        generator: Source of all random draws. A new one on the CPU, seeded from torch's global seed, when None. With
            several processes, seed it alike on all: each takes its share of the same draws.

    Raises:
        ValueError: An argument is out of its range.

    Examples:

        ```python
        criterion = CoreTuningLoss(model.num_features)  # its projection head has parameters: give them to the optimizer
        feature_map = model.forward_features(images)
        features = model.forward_head(feature_map, pre_logits=True)
        loss = criterion(features, model.get_classifier()(features), target)
        ```
    """

    def __init__(
        self,
        num_features: int,
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
    ):
        super().__init__()
        if num_features < 1 or projection_dim < 1:
            raise ValueError(
                f'Expected num_features and projection_dim >= 1, got {num_features} and {projection_dim}. num_features '
                'is the width before the classifier: model.num_features, or model.head_hidden_size where it exists.'
            )
        if not contrast_weight >= 0.0:
            raise ValueError(f'Expected contrast_weight >= 0, got {contrast_weight}. 0 switches the contrast off.')
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f'Expected label_smoothing in [0, 1), got {label_smoothing}.')
        self.num_features = num_features
        self.contrast_weight = contrast_weight
        self.label_smoothing = label_smoothing
        self.gather = gather
        self.uneven_batches = uneven_batches
        self.mixup = HardPairMixup(mixup_alpha, min_positive_lam, min_negative_lam, generator=generator)
        self.contrast = FocalSupConLoss(temperature, focal=focal)
        # a parameter that gets no gradient stalls DistributedDataParallel
        self.projector = ProjectionHead(num_features, projection_dim) if contrast_weight else None

    def extra_repr(self) -> str:
        return f'contrast_weight={self.contrast_weight}, label_smoothing={self.label_smoothing}, mixup={self.mixup}'

    def check_shapes(self, features: torch.Tensor, logits: torch.Tensor) -> None:
        """Raise a ValueError unless features (B, num_features) and logits (B, C) belong together."""
        check_features(features, allow_empty=self.uneven_batches)
        if features.shape[1] != self.num_features:
            raise ValueError(
                f'Expected features (batch_size, {self.num_features}), got {tuple(features.shape)}. Create the loss '
                f'with num_features={features.shape[1]}.'
            )
        if logits.ndim != 2 or logits.shape[0] != features.shape[0] or not logits.is_floating_point():
            raise ValueError(
                f'Expected floating-point logits ({features.shape[0]}, num_classes) to go with features '
                f'{tuple(features.shape)}, got {logits.dtype} {tuple(logits.shape)}.'
            )

    def prepare(
        self,
        batch_size: int,
        device: torch.device,
        rows_per_image: int = 1,
    ) -> Tuple[GlobalBatch, Optional[MixupDraws]]:
        """What a step needs from outside a compiled region: where its rows lie in the global batch, and random draws.

        Image b of process r takes the draws of image b * num_processes + r, the place it has in one process that reads
        the same data.
        """
        batch = GlobalBatch.create(batch_size, self.gather, self.uneven_batches, device, rows_per_image)
        if not self.mixup.mixup_enabled:
            return batch, None
        _, num_processes = process_index_and_count()
        draws = self.mixup.draw(num_processes * max(batch.sizes), device)
        return batch, MixupDraws(*map(batch.own_share, draws))

    def compute(
        self,
        features: torch.Tensor,
        logits: torch.Tensor,
        target: torch.Tensor,
        batch: GlobalBatch,
        draws: Optional[MixupDraws],
        clean_loss: Optional[torch.Tensor] = None,
    ) -> Dict[str, torch.Tensor]:
        """The losses, given what `prepare` returned. Compiles as one graph; checks nothing, synchronises nothing.

        Rows whose class index is negative take no part. Where more is known of the clean batch than its rows tell, its
        mean cross-entropy is given as clean_loss.
        """
        label = batch.gather(hard_label(target))
        own = batch.own_rows(features.device)
        mixtures = None
        if draws is not None:
            order = batch.reading_order(features.device)
            mixtures = self.mixup.pair(batch.gather(features.detach()), label, draws, anchor=own, order=order)
        task_loss = self._task_loss(logits, target, label, batch, mixtures, clean_loss)
        if self.projector is None:
            return {'loss': task_loss, 'task_loss': task_loss}
        contrast_loss = self._contrast_loss(features, label, batch, own, mixtures)
        return {
            'loss': task_loss + self.contrast_weight * contrast_loss,
            'task_loss': task_loss,
            'contrast_loss': contrast_loss,
        }

    def losses(
        self,
        features: torch.Tensor,
        logits: torch.Tensor,
        target: torch.Tensor,
    ) -> Dict[str, torch.Tensor]:
        """
        Args:
            features: Pre-logits features of the clean batch, any floating dtype (B, D).
            logits: What the classifier made of them, any floating dtype (B, C).
            target: Class indices of an integer dtype (B,), or soft targets (B, C), whose most probable class is mined.

        Returns:
            Scalars of float32 or better, in nats: 'loss', the sum to minimise; 'task_loss', the cross-entropy over
            clean rows and mixtures; 'contrast_loss', before its weight, absent when the weight is 0. With several
            processes, the share of this process: their average is the global mean.

        Raises:
            ValueError: Shapes, dtypes or labels do not fit.
        """
        self.check_shapes(features, logits)
        check_target(target, features.shape[0], logits.shape[1])
        return self.compute(features, logits, target, *self.prepare(features.shape[0], features.device))

    def forward(
        self,
        features: torch.Tensor,
        logits: torch.Tensor,
        target: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """The loss to minimise, a scalar. Arguments and errors as in `losses`."""
        if target is None:
            raise ValueError(
                'Expected (features, logits, target), got two arguments. CoreTuningLoss needs the features before the '
                'classifier, which a task that passes only logits cannot give: use timm_coretune.CoreTuningTask '
                'instead of timm.task.ClassificationTask.'
            )
        return self.losses(features, logits, target)['loss']

    def _task_loss(
        self,
        logits: torch.Tensor,
        target: torch.Tensor,
        label: torch.Tensor,
        batch: GlobalBatch,
        mixtures: Optional[HardMixtures],
        clean_loss: Optional[torch.Tensor],
    ) -> torch.Tensor:
        target = target if target.ndim == 2 else target.long()
        left_out = label.index_select(0, batch.own_rows(label.device)) < 0
        if clean_loss is None:
            clean = self._nll(at_least_float32(logits).log_softmax(dim=-1), target)
            clean_loss = batch.mean(clean.masked_fill(left_out, 0.0).sum(), label)
        if mixtures is None:
            return clean_loss
        all_logits, all_target = at_least_float32(batch.gather(logits)), batch.gather(target)

        def mixed(mixture: Mixture) -> torch.Tensor:
            log_p = mixture.mix(all_logits).log_softmax(dim=-1)
            # cross-entropy is linear in the target
            return torch.lerp(
                self._nll(log_p, all_target.index_select(0, mixture.other)),
                self._nll(log_p, all_target.index_select(0, mixture.index)),
                mixture.lam.to(log_p.dtype),
            )

        positive = mixed(mixtures.positive).masked_fill(left_out, 0.0)
        negative = mixed(mixtures.negative).masked_fill(left_out | ~mixtures.has_negative, 0.0)
        # a batch of one class has no semi-hard negatives, any other has one for each image
        num_parts = 2 + mixtures.has_negative.any()
        return (clean_loss + batch.mean(positive.sum() + negative.sum(), label)) / num_parts

    def _nll(self, log_p: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of each row (B,) from log-probabilities (B, C) and class indices or soft targets."""
        if target.ndim == 2:
            return -(target.to(log_p.dtype) * log_p).sum(dim=-1)
        nll = -log_p.gather(1, target.clamp(min=0)[:, None])[:, 0]
        if self.label_smoothing:
            nll = torch.lerp(nll, -log_p.mean(dim=-1), self.label_smoothing)
        return nll

    def _contrast_loss(
        self,
        features: torch.Tensor,
        label: torch.Tensor,
        batch: GlobalBatch,
        own: torch.Tensor,
        mixtures: Optional[HardMixtures],
    ) -> torch.Tensor:
        unit, *extra = self.projector(features, mixtures, batch).split(features.shape[0])
        per_anchor = self.contrast.per_anchor(
            batch.gather(unit),
            label,
            *extra,
            has_negative=None if mixtures is None else mixtures.has_negative,
            anchor=own,
        )
        return batch.mean(per_anchor.sum(), label)
