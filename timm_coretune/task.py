"""Core-tuning task

Everything trainable runs inside one call of one module, so that DistributedDataParallel, autocast and torch.compile see
it. Checks of the target and random draws stay outside: neither can be in a compiled graph.
"""

import logging
from typing import Any, Dict, Iterable, List, Optional, Set, Tuple, Union, cast

import torch
import torch.nn as nn
from timm.task import TrainingTask
from timm.utils import unwrap_model

from .checks import check_target
from .loss import CoreTuningLoss, TaskLoss
from .timm_model import (
    GroupMatcher,
    check_classifier,
    classifier_parameters,
    get_feature_dim,
    group_matcher,
    no_weight_decay,
)

_logger = logging.getLogger(__name__)


class _ClassifierInput:
    """Forward pre-hook that keeps what a classifier is called with, so that one pass gives features and logits."""

    def __init__(self) -> None:
        self.armed = False
        self.value: Optional[torch.Tensor] = None

    def __call__(self, module: nn.Module, args: Tuple[torch.Tensor, ...]) -> None:
        if self.armed:
            self.value = args[0]


class CoreTuningModule(nn.Module):
    """Model and criterion as the one module that is wrapped, compiled and given to the optimizer.

    In training mode it returns losses, in evaluation mode the model's output.

    Args:
        model: A timm classifier.
        criterion: The loss. Its parameters train along with the model.
    """

    def __init__(self, model: nn.Module, criterion: TaskLoss):
        super().__init__()
        self.model: Any = model
        self.criterion = criterion
        self._classifier_input = _ClassifierInput()
        classifier = cast(Any, model).get_classifier()
        if isinstance(classifier, nn.Module) and not isinstance(classifier, nn.ModuleList):
            classifier.register_forward_pre_hook(self._classifier_input)

    def no_weight_decay(self) -> Set[str]:
        return no_weight_decay(self.model, 'model.')

    def group_matcher(self, coarse: bool = False) -> GroupMatcher:
        return group_matcher(self.model, 'model.', coarse=coarse)

    def forward_features_and_logits(
        self,
        input: Union[torch.Tensor, Dict[str, torch.Tensor]],
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Pre-logits features (B, D) and logits (B, C) of one pass through the backbone.

        Features are the classifier's own input. Where it has none of that shape (several classifiers, a classifier on
        feature maps) they come from `forward_head(pre_logits=True)`, which repeats what the head does before.
        """
        feature_map = None if isinstance(input, dict) else self.model.forward_features(input)
        self._classifier_input.armed = True
        # patches and their coordinates are taken apart by the model's own forward only
        logits = self.model(input) if feature_map is None else self.model.forward_head(feature_map)
        features, self._classifier_input.value = self._classifier_input.value, None
        self._classifier_input.armed = False
        if not isinstance(logits, torch.Tensor):
            raise ValueError(
                f'Expected one tensor of logits from {type(self.model).__name__}, got {type(logits).__name__}. For a '
                'model with distillation heads call model.set_distilled_training(False).'
            )
        if isinstance(features, torch.Tensor):
            features = features.flatten(1)  # (B, D, 1, 1) before a 1 x 1 convolution
        if features is None or features.shape[1] != (self.criterion.num_features or features.shape[1]):
            features = self.model.forward_head(feature_map, pre_logits=True)
        return features, logits

    def forward(
        self,
        input: Union[torch.Tensor, Dict[str, torch.Tensor]],
        target: Optional[torch.Tensor] = None,
        *prepared: Any,
    ) -> Any:
        if not self.training:
            return self.model(input)
        features, logits = self.forward_features_and_logits(input)
        self.criterion.check_shapes(features, logits)
        losses = self.criterion.compute(features, logits, cast(torch.Tensor, target), *prepared)
        return {**losses, 'output': logits}


class CoreTuningTask(TrainingTask):
    """Tunes a timm classifier with a loss on its features and logits, by default that of Core-tuning.

    The evaluation model and the checkpointed weights are the plain timm model. What the loss keeps (projection head,
    random generator) is checkpointed apart, as task state.

    A loop calls `after_update()` after each step of the optimizer. The Core-tuning loss does not need it; losses that
    keep a moving encoder do.

    Args:
        model: A timm classifier with num_classes > 0.
        criterion: The loss. A CoreTuningLoss of loss_kwargs when None.
        device: Device for task tensors and the parameters of the loss.
        dtype: Dtype of the parameters of the loss, as the model's when it is not float32.
        verbose: Enable info logging.
        **loss_kwargs: Arguments of CoreTuningLoss, but num_features, which the model tells.

    Raises:
        ValueError: The model is no classifier, an argument of the loss is out of range, or criterion and loss_kwargs
            are both given.

    Examples:

        ```python
        task = CoreTuningTask(model, contrast_weight=0.1, device=torch.device('cuda'))
        result = task(input, target)
        result['loss'].backward()
        ```
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Optional[TaskLoss] = None,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
        verbose: bool = True,
        **loss_kwargs: Any,
    ):
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        plain_model = unwrap_model(model)
        self.check_model(plain_model)
        if criterion is None:
            criterion = CoreTuningLoss(self.get_feature_dim(plain_model), **loss_kwargs)
        elif loss_kwargs:
            raise ValueError(f'Pass either a criterion or its arguments, not both: {sorted(loss_kwargs)}.')
        criterion.attach(plain_model)
        criterion = criterion.to(device=self.device, dtype=self.dtype)
        self.trainable_module: Any = self.create_module(model, criterion)
        if self.verbose:
            _logger.info(f'{type(self).__name__}: features={criterion.num_features}, {criterion.extra_repr()}')

    def check_model(self, model: nn.Module) -> None:
        """Raise a ValueError for a model that this task cannot train."""
        check_classifier(model)

    def get_feature_dim(self, model: nn.Module) -> int:
        """Width of the features that the loss gets."""
        return get_feature_dim(model)

    def create_module(self, model: nn.Module, criterion: TaskLoss) -> CoreTuningModule:
        """The one module that trains."""
        return CoreTuningModule(model, criterion)

    @property
    def criterion(self) -> TaskLoss:
        return unwrap_model(self.trainable_module).criterion

    @property
    def is_global_mean(self) -> bool:
        """Whether the average of the loss over processes is the mean over all their images, whatever their batches."""
        return self.criterion.is_global_mean

    def after_update(self) -> None:
        """Let the loss follow an update of the weights. Call it after each step of the optimizer."""
        module = unwrap_model(self.trainable_module)
        module.criterion.after_update(module.model)

    def prepare_distributed(self, device_ids: Optional[list] = None, **ddp_kwargs: Any) -> 'CoreTuningTask':
        """Wrap model and loss in DistributedDataParallel. Returns self."""
        from torch.nn.parallel import DistributedDataParallel as DDP

        self.trainable_module = DDP(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def compile(  # type: ignore[override]  # as timm's tasks, not as torch's modules
        self,
        backend: str = 'inductor',
        mode: Optional[str] = None,
        **compile_kwargs: Any,
    ) -> nn.Module:
        """Compile the training step and the evaluation model. Returns the latter."""
        module = self.trainable_module
        self.eval_model: Any = torch.compile(module.model, backend=backend, mode=mode, **compile_kwargs)
        self.trainable_module = torch.compile(module, backend=backend, mode=mode, **compile_kwargs)
        return cast(nn.Module, self.eval_model)

    def get_eval_model(self, module: Optional[nn.Module] = None, ema: bool = False) -> Optional[nn.Module]:
        resolved = super().get_eval_model(module=module, ema=ema)
        if resolved is None:
            return None
        inner = unwrap_model(resolved)
        return inner.model if isinstance(inner, CoreTuningModule) else resolved

    def get_clip_parameters(self, exclude_head: bool = False) -> List[nn.Parameter]:
        module = unwrap_model(self.trainable_module)
        excluded: Iterable[nn.Parameter] = classifier_parameters(module.model) if exclude_head else ()
        excluded_ids = {id(p) for p in excluded}
        return [p for p in module.parameters() if id(p) not in excluded_ids]

    def get_task_state(self, module: Optional[nn.Module] = None, ema: bool = False) -> Dict[str, Any]:
        module = module if module is not None else self.get_trainable_module(ema=ema)
        return {} if module is None else unwrap_model(module).criterion.task_state()

    def load_task_state(
        self,
        state: Optional[Dict[str, Any]],
        strict: bool = True,
        module: Optional[nn.Module] = None,
        ema: bool = False,
    ) -> None:
        if not state:
            return
        module = module if module is not None else self.get_trainable_module(ema=ema)
        if module is None:
            raise RuntimeError('Cannot load EMA task state before setup_ema().')
        unwrap_model(module).criterion.load_task_state(state, strict)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        """One training step's forward pass.

        Args:
            input: Images (B, 3, H, W).
            target: Class indices (B,) or soft targets (B, C).

        Returns:
            'loss' to minimise and its parts, scalars: of Core-tuning 'task_loss' and (unless its weight is 0)
            'contrast_loss'. 'output', the logits of the clean images (B, C).

        Raises:
            ValueError: target does not fit the batch or the classes of the model.
        """
        module = unwrap_model(self.trainable_module)
        # images, or a dictionary of patches whose batch size the loss compares with that of target
        batch_size = input.shape[0] if isinstance(input, torch.Tensor) else len(target)
        check_target(target, batch_size, module.model.num_classes)
        prepared = module.criterion.prepare(batch_size, target.device)
        return self.trainable_module(input, target, *prepared)
