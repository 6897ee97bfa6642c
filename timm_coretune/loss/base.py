"""Base class of losses on the features and logits of labelled rows

`CoreTuningTask` and `SegmentationTask` work with any subclass. A row is an image, or an anchor pixel of an image.
"""

import inspect
from typing import Any, Callable, Dict, FrozenSet, Optional, Sequence, Tuple, Type, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.loss import create_classification_loss
from timm.utils import unwrap_model

from ..checks import check_features, check_not_recomputed, check_target
from ..distributed import GlobalBatch, copy_to, process_index_and_count
from ..mining import at_least_float32, hard_label
from ..mining.label_sets import check_multi_label, label_sets
from .parts.cross_entropy import finite, infinite_again, nll
from .parts.update_watch import UpdateWatch, find_parameter

Classifier = Callable[[torch.Tensor], torch.Tensor]
_FIX = {
    'classifier': 'The loss classifies features itself, and this classifier is not affine or is asked for other '
    'features. Pass classifier=model.get_classifier().',
    'model': 'The loss compares the weights of the model with those it had. Pass model=model.',
    'input': 'The loss compares features with those of a copy of the network. Pass input=images.',
    'maps': 'The loss compares feature maps. Pass the averages that loss.parts.forward.forward_maps(model, images, '
    'criterion.map_indices) returns.',
}


class TaskLoss(nn.Module):
    """Base class of the losses. A subclass defines `compute`; everything else has a default.

    A loss may have parameters, which are trained, and buffers. The random generator is part of the `state_dict`, so a
    loop that saves the loss and is resumed draws the same numbers as an uninterrupted run.

    Args:
        gather: Compare rows with those of all processes. Otherwise each process compares only its own rows.
        uneven_batches: Processes may hold batches of different sizes. These are exchanged in every step, which waits
            for the device. When False, sizes must be equal, as they are when the loader drops the last batch.
        label_smoothing: Share of a class index target that is spread evenly over all classes, in [0, 1).
        class_weight: Weight of each class in the cross-entropy (C,), finite and >= 0. It multiplies the class's share
            of a target, so a row of class c has the weight of c, and a mixture the mixed weight. The mean is over the
            rows, as in timm's losses, and not over the weights. When None, every class has the weight 1.
        generator: Source of all random draws. When None, a new one on the CPU, seeded from torch's global seed. With
            several processes it needs the same seed on all of them, since each uses its part of the same draws.
        multi_label: Images may have several labels or none. Targets are multi-hot rows (B, C) in [0, 1].
        classification_loss: The loss on the labels in place of the cross-entropy. A module of logits (B, C) and soft
            targets (B, C) that returns the mean over rows, such as those of timm.loss.create_classification_loss. Class
            indices reach it as one-hot rows with the label_smoothing of this loss, so it should have none itself. With
            multi_label it gets multi-hot rows as they are, and any smoothing is its own. When None, it is the
            cross-entropy, and with multi_label the binary cross-entropy with label_smoothing.

    Attributes:
        num_features: Width D of the features, None if any width is accepted.
        requires: Names of further keyword arguments that `compute` needs: 'classifier', which maps features (N, D) to
            logits (N, C), the 'model', its 'input', or its 'maps'. Tasks pass them. `attach` may set it.
        map_indices: Indices of the feature maps of which 'maps' are the averages, as `forward_intermediates` of a timm
            model counts them. `attach` sets it.
        contrasts: Whether the rows of a batch are compared with each other, so that its size matters.
        for_multi_label: Whether the loss has a meaning for images with several labels.
        takes_classification_loss: Whether a classification_loss may take the place of the cross-entropy.
        for_pixels: Whether the loss has a meaning for anchor pixels. `SegmentationTask` takes no other.
        keeps_copy: Whether the loss keeps a copy of the model, whole on each process. FSDP cannot train it.
        is_global_mean: Whether averaging the loss over processes gives the mean over all rows, even if batches differ
            in size. When False, the training loop scales the loss to make it so.

    Raises:
        ValueError: label_smoothing or class_weight is out of its range, the loss has no meaning for several labels, or
            takes no classification_loss, or one is given with a class_weight.
    """

    num_features: Optional[int] = None
    requires: Tuple[str, ...] = ()
    map_indices: Tuple[int, ...] = ()
    contrasts: bool = False
    for_pixels: bool = True
    for_multi_label: bool = True
    takes_classification_loss: bool = True
    keeps_copy: bool = False
    is_global_mean: bool = True

    def __init__(
        self,
        gather: bool = True,
        uneven_batches: bool = False,
        label_smoothing: float = 0.0,
        generator: Optional[torch.Generator] = None,
        class_weight: Optional[Sequence[float]] = None,
        multi_label: bool = False,
        classification_loss: Optional[nn.Module] = None,
    ):
        super().__init__()
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f'Expected label_smoothing in [0, 1), got {label_smoothing}.')
        weight = None if class_weight is None else torch.as_tensor(class_weight, dtype=torch.float32)
        if weight is not None and (weight.ndim != 1 or not (weight.isfinite() & (weight >= 0)).all()):
            raise ValueError(
                f'Expected class_weight of one finite number >= 0 for each class, got {class_weight}. Classes that '
                'occur n times may have the weights of timm.loss.compute_class_weights(n, num_samples).'
            )
        self.class_weight: Optional[torch.Tensor]
        self.register_buffer('class_weight', weight, persistent=False)  # a setting, as label_smoothing is
        self.gather = gather
        self.uneven_batches = uneven_batches
        self.label_smoothing = label_smoothing
        if multi_label and not self.for_multi_label:
            raise ValueError(f'{type(self).__name__} compares images by their one class, got multi_label=True.')
        if classification_loss is not None and not self.takes_classification_loss:
            raise ValueError(
                f'Expected no classification_loss, got {type(classification_loss).__name__}: {type(self).__name__} '
                'takes the cross-entropy of more rows than those of the batch.'
            )
        if class_weight is not None and (multi_label or classification_loss is not None):
            raise ValueError(
                'Expected no class_weight with a classification_loss or multi_label=True, got one. Give the weights to '
                'the classification_loss, as class_weight of timm.loss.create_classification_loss.'
            )
        self.multi_label = multi_label
        if multi_label and classification_loss is None:
            classification_loss = create_classification_loss(multi_label=True, smoothing=label_smoothing)
        self.classification_loss = classification_loss
        self.generator = generator if generator is not None else torch.Generator().manual_seed(torch.initial_seed())
        self._updates = UpdateWatch()

    def attach(self, model: nn.Module) -> None:
        """Called once with the model, before anything is wrapped, compiled or given to the optimizer.

        A loss that needs a copy of the model, such as a momentum encoder, creates it here.
        """

    def attach_optimizer(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        """Called once with the optimizer, before the first update. A loss that corrects updates hooks on to it here."""

    def start(self, num_updates: int) -> None:
        """Called once with the number of updates of the whole run, for a loss that changes over it."""

    def check_shapes(self, features: torch.Tensor, logits: torch.Tensor) -> None:
        """Raise a ValueError unless features (B, D) and logits (B, C) fit each other. torch.compile traces this."""
        check_features(features, allow_empty=self.uneven_batches)
        if self.num_features is not None and features.shape[1] != self.num_features:
            raise ValueError(
                f'Expected features (batch_size, {self.num_features}), got {tuple(features.shape)}. Create the loss '
                f'with num_features={features.shape[1]}.'
            )
        if logits.ndim != 2 or logits.shape[0] != features.shape[0] or not logits.is_floating_point():
            raise ValueError(
                f'Expected floating-point logits ({features.shape[0]}, num_classes) to go with features '
                f'{tuple(features.shape)}, got {logits.dtype} {tuple(logits.shape)}.'
            )
        if self.class_weight is not None and len(self.class_weight) != logits.shape[1]:
            raise ValueError(
                f'Expected a class_weight for each of the {logits.shape[1]} classes, got {len(self.class_weight)}.'
            )

    def check_target(self, target: torch.Tensor, batch_size: int, num_classes: int) -> None:
        """Raise a ValueError unless the target fits the batch, the classes, and whether images have several labels."""
        (check_multi_label if self.multi_label else check_target)(target, batch_size, num_classes)

    def check_updates(self, model: nn.Module) -> None:
        """Warn if an optimizer updates the model, and not this loss. Called in each step of a task."""
        self._updates.see(self, lambda: next((p for p in model.parameters() if p.requires_grad), None))

    def labels_of(self, target: torch.Tensor) -> torch.Tensor:
        """What says which rows are positives: the class of each (B,), or with multi_label its label set (B, C)."""
        return label_sets(target) if self.multi_label else hard_label(target)

    def check_given(self, **further: Any) -> None:
        """Raise a ValueError if one of these arguments is None although the loss requires it."""
        for name in self.requires:
            if name in further and further[name] is None:
                raise ValueError(f'Expected {name}=... of {type(self).__name__}. {_FIX[name]}')

    def check_gather(self) -> None:
        """Raise a ValueError if `gather` is False, for a loss that remembers rows."""
        if not self.gather:
            raise ValueError(
                f'Expected gather=True of {type(self).__name__}, got False. What it remembers must be the same on all '
                'processes. Leave out --no-coretune-gather.'
            )

    def attached(self, copy_of_model: Optional[nn.Module]) -> Any:
        """What `attach` created. Raises a RuntimeError if it was not called."""
        if copy_of_model is None:
            raise RuntimeError(
                f'Expected criterion.attach(model) before the first step of {type(self).__name__}, which keeps a copy '
                'of the model. Tasks call it by themselves.'
            )
        return copy_of_model

    def prepare(self, batch_size: int, device: torch.device, rows_per_image: int = 1) -> Tuple[Any, ...]:
        """Prepare what a step needs from outside the compiled region, such as random draws.

        Args:
            batch_size: Number of images on this process.
            device: Device of the features.
            rows_per_image: Number of rows per image.

        Returns:
            Further arguments of `compute`. The first is the GlobalBatch, which gives the place of the rows of this
            process among those of all processes. Wrappers of the module may round floats among the others.
        """
        return (GlobalBatch.create(batch_size, self.gather, self.uneven_batches, device, rows_per_image),)

    def compute(
        self,
        features: torch.Tensor,
        logits: torch.Tensor,
        target: torch.Tensor,
        *prepared: Any,
        clean_loss: Optional[torch.Tensor] = None,
        **further: Any,
    ) -> Dict[str, torch.Tensor]:
        """Compute the losses of a step. It runs in the compiled, distributed region: no checks, no synchronisation.

        Args:
            features: Pre-logits features (B, D) of any floating dtype.
            logits: Output of the classifier for these features (B, C), any floating dtype.
            target: Class indices (B,) int64, negative for rows that take no part, or soft targets (B, C). With
                multi_label multi-hot targets (B, C).
            *prepared: What `prepare` returned.
            clean_loss: Cross-entropy of the batch, a scalar, if the task has computed it. In segmentation it is the
                mean over all pixels, of which the rows are only a few. When None, it is computed from the rows.
            **further: What `requires` names.

        Returns:
            Scalars in float32 or float64: 'loss', which is minimised, and its parts, whose names end in '_loss'.
        """
        raise NotImplementedError(f'{type(self).__name__} must define compute().')

    def cross_entropy(
        self,
        logits: torch.Tensor,
        target: torch.Tensor,
        label: torch.Tensor,
        batch: GlobalBatch,
        clean_loss: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Mean cross-entropy of the batch, a scalar. Its average over processes is the mean over all labelled rows.

        Args:
            logits: Logits of the rows of this process (B, C). One of -inf excludes a class.
            target: Their class indices or soft targets, as for `compute`.
            label: Class of the rows of all processes (N,), as `batch.gather(self.labels_of(target))` gives it.
            batch: The global batch.
            clean_loss: Returned as it is, if given.
        """
        if clean_loss is not None:
            return clean_loss
        if self.classification_loss is not None:
            soft = self.soft_target(target, logits)
            return self.label_loss(logits, soft, label, batch)
        left_out = label[batch.own] < 0
        target = target if target.ndim == 2 else target.long()
        loss = infinite_again(self.nll(at_least_float32(logits).log_softmax(dim=-1), target))
        return batch.mean(loss.masked_fill(left_out, 0.0).sum(), label)

    def nll(self, log_p: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of rows in nats (B,), with the smoothing and the class weights of this loss.

        Args:
            log_p: Log-probabilities (B, C).
            target: Class indices (B,) int64, or soft targets (B, C).
        """
        return nll(log_p, target, self.label_smoothing, self.class_weight)

    def soft_target(self, target: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Soft targets (B, C), which stay as they are, of class indices (B,) with the label smoothing of this loss."""
        if target.ndim == 2:
            return target
        one_hot = F.one_hot(target.long(), logits.shape[1]).to(at_least_float32(logits[:0]).dtype)
        return one_hot * (1.0 - self.label_smoothing) + self.label_smoothing / logits.shape[1]

    def label_loss(
        self,
        logits: torch.Tensor,
        target: torch.Tensor,
        label: torch.Tensor,
        batch: GlobalBatch,
    ) -> torch.Tensor:
        """The classification_loss of logits and soft targets of the rows of this process (B, C), a scalar.

        Its average over processes is the mean over all rows.
        """
        logits = finite(logits)  # one of -inf excludes a class
        if len(logits) == 0:  # whose mean would be NaN
            return logits.sum()
        loss = cast(nn.Module, self.classification_loss)(logits, target.to(logits.dtype))
        return loss if min(batch.sizes) == max(batch.sizes) else batch.mean(loss * len(logits), label)

    def losses(
        self,
        features: torch.Tensor,
        logits: torch.Tensor,
        target: torch.Tensor,
        **further: Any,
    ) -> Dict[str, torch.Tensor]:
        """Compute the loss to minimise and its parts, in a loop of your own.

        Args:
            features: Pre-logits features of the batch (B, D), any floating dtype.
            logits: Output of the classifier for these features (B, C), any floating dtype.
            target: Class indices of an integer dtype (B,), or soft targets (B, C), whose most probable class counts
                where a loss needs one class. With multi_label multi-hot targets (B, C).
            **further: What `requires` names, such as classifier=model.get_classifier().

        Returns:
            Scalars in float32 or float64, in nats: 'loss', the weighted sum to minimise, and its parts without their
            weights, such as 'task_loss', the cross-entropy, and 'contrast_loss'. With several processes each has its
            own values, and their average over processes is the global mean.

        Raises:
            ValueError: Shapes, dtypes or labels do not fit, or something that the loss requires is missing.
        """
        self.check_shapes(features, logits)
        self.check_target(target, features.shape[0], logits.shape[1])
        self.check_given(**{name: further.get(name) for name in self.requires})
        if 'model' in further:
            further['model'] = unwrap_model(further['model'])  # whose parameters have other names
        self._updates.see(self, lambda: find_parameter(logits, features))
        prepared = self.prepare(features.shape[0], features.device)
        return self.compute(features, logits, target, *prepared, **further)

    def forward(
        self,
        features: torch.Tensor,
        logits: torch.Tensor,
        target: Optional[torch.Tensor] = None,
        **further: Any,
    ) -> torch.Tensor:
        """The loss to minimise, a scalar. Arguments and errors as in `losses`."""
        if target is None:
            raise ValueError(
                f'Expected (features, logits, target), got two arguments. {type(self).__name__} needs the features '
                'before the classifier, which a task that passes only logits cannot give: use '
                'timm_coretune.CoreTuningTask instead of timm.task.ClassificationTask.'
            )
        return self.losses(features, logits, target, **further)['loss']

    def after_update(self, model: nn.Module) -> None:
        """Called after each update of the weights, outside autograd. A momentum encoder is updated here."""

    def draw_image_seeds(self, batch: GlobalBatch, device: torch.device) -> torch.Tensor:
        """Draw a random integer in [0, 2**32) for each image of this process (B,) int64.

        Image b of process r uses draw b * num_processes + r, which is also its draw in a single process that reads the
        same data. All processes draw equally many numbers, so their generators stay in step.
        """
        check_not_recomputed()
        rank, num_processes = process_index_and_count()
        most_images = max(batch.sizes) // batch.rows_per_image
        own_images = batch.sizes[batch.rank] // batch.rows_per_image
        shape, generator = (num_processes * most_images,), self.generator
        seeds = torch.randint(2**32, shape, generator=generator, device=generator.device)
        return copy_to(seeds[rank::num_processes][:own_images], device)

    def task_state(self) -> Dict[str, Any]:
        """State of the loss for a checkpoint of the task."""
        return {'criterion': self.state_dict()}

    def load_task_state(self, state: Dict[str, Any], strict: bool = True) -> None:
        """Load what `task_state` returned.

        Raises:
            RuntimeError: The state does not fit this loss and strict is True.
        """
        if strict and 'criterion' not in state:
            raise RuntimeError(
                f'Expected the state of a {type(self).__name__}, got one with {sorted(state)}. Resume with the loss '
                'that the checkpoint was trained with.'
            )
        self.load_state_dict(state.get('criterion', {}), strict=strict)

    def get_extra_state(self) -> torch.Tensor:
        """State of the generator as a uint8 tensor, so that safetensors can hold the `state_dict` too."""
        return self.generator.get_state()

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.generator.set_state(state.cpu())

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any) -> None:
        # older states have no generator; they still load, and the generator keeps its own state
        state_dict.setdefault(f'{prefix}_extra_state', self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *args)


def defaults_of(loss: Type[TaskLoss]) -> Dict[str, Any]:
    """All arguments of a loss with their defaults, those that it hands on to its base classes included.

    An argument without a default has inspect.Parameter.empty.
    """
    inits = (vars(cls)['__init__'] for cls in loss.__mro__ if issubclass(cls, TaskLoss) and '__init__' in vars(cls))
    parameters = [p for init in inits for p in inspect.signature(init).parameters.values()]
    # a subclass comes first, and its default counts
    return {p.name: p.default for p in reversed(parameters) if p.name not in ('self', 'args', 'kwargs')}


def arguments_of(loss: Type[TaskLoss]) -> FrozenSet[str]:
    """Names of all arguments of a loss."""
    return frozenset(defaults_of(loss))
