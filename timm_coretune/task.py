"""Core-tuning task

Everything trainable runs inside one call of one module, so that DistributedDataParallel, autocast and torch.compile see
it. Checks of the target and random draws stay outside: neither can be in a compiled graph.
"""

import logging
from typing import Any, Dict, Optional, Tuple

import torch
import torch.nn as nn
from timm.task import TrainingTask
from timm.utils import unwrap_model

from .checks import check_target
from .distributed import GlobalBatch
from .loss.core_tuning import CoreTuningLoss
from .mixup import MixupDraws
from .timm_model import classifier_parameters, get_feature_dim, group_matcher, no_weight_decay

_logger = logging.getLogger(__name__)


class _ClassifierInput:
    """Forward pre-hook that keeps what a classifier is called with, so that one pass gives features and logits."""

    def __init__(self):
        self.armed = False
        self.value = None

    def __call__(self, module: nn.Module, args: Tuple[torch.Tensor, ...]) -> None:
        if self.armed:
            self.value = args[0]


class CoreTuningModule(nn.Module):
    """Model and criterion as the one module that is wrapped, compiled and given to the optimizer.

    In training mode it returns losses, in evaluation mode the model's output.

    Args:
        model: A timm classifier.
        criterion: The loss, whose projection head is trained along.
    """

    def __init__(self, model: nn.Module, criterion: CoreTuningLoss):
        super().__init__()
        self.model = model
        self.criterion = criterion
        self._classifier_input = _ClassifierInput()
        classifier = model.get_classifier()
        if isinstance(classifier, nn.Module) and not isinstance(classifier, nn.ModuleList):
            classifier.register_forward_pre_hook(self._classifier_input)

    def no_weight_decay(self):
        return no_weight_decay(self.model, 'model.')

    def group_matcher(self, coarse: bool = False):
        return group_matcher(self.model, 'model.', coarse=coarse)

    def forward_features_and_logits(self, input: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
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
        if not isinstance(features, torch.Tensor) or features.shape[1] != self.criterion.num_features:
            features = self.model.forward_head(feature_map, pre_logits=True)
        return features, logits

    def forward(
        self,
        input: torch.Tensor,
        target: Optional[torch.Tensor] = None,
        batch: Optional[GlobalBatch] = None,
        draws: Optional[MixupDraws] = None,
    ):
        if not self.training:
            return self.model(input)
        features, logits = self.forward_features_and_logits(input)
        self.criterion.check_shapes(features, logits)
        return {**self.criterion.compute(features, logits, target, batch, draws), 'output': logits}


class CoreTuningTask(TrainingTask):
    """Core-tunes a timm classifier.

    The evaluation model and the checkpointed weights are the plain timm model; projection head and random generator are
    checkpointed apart, as task state.

    Args:
        model: A timm classifier with num_classes > 0.
        criterion: The loss. Created from loss_kwargs when None.
        device: Device for task tensors and the projection head.
        dtype: Dtype of the projection head, as the model's when it is not float32.
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
        criterion: Optional[CoreTuningLoss] = None,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
        verbose: bool = True,
        **loss_kwargs,
    ):
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        feature_dim = self.get_feature_dim(unwrap_model(model))
        if criterion is None:
            criterion = CoreTuningLoss(feature_dim, **loss_kwargs)
        elif loss_kwargs:
            raise ValueError(f'Pass either a criterion or its arguments, not both: {sorted(loss_kwargs)}.')
        criterion = criterion.to(device=self.device, dtype=self.dtype)
        self.trainable_module = self.create_module(model, criterion)
        if self.verbose:
            _logger.info(f'{type(self).__name__}: features={feature_dim}, {criterion.extra_repr()}')

    def get_feature_dim(self, model: nn.Module) -> int:
        """Width of what is contrasted, before its projection."""
        return get_feature_dim(model)

    def create_module(self, model: nn.Module, criterion: CoreTuningLoss) -> CoreTuningModule:
        """The one module that trains."""
        return CoreTuningModule(model, criterion)

    @property
    def criterion(self) -> CoreTuningLoss:
        return unwrap_model(self.trainable_module).criterion

    @property
    def mixup(self):
        """The HardPairMixup of the loss, whose mixup_enabled a training loop can clear."""
        return self.criterion.mixup

    def prepare_distributed(self, device_ids: Optional[list] = None, **ddp_kwargs) -> 'CoreTuningTask':
        """Wrap model and projection head in DistributedDataParallel. Returns self."""
        from torch.nn.parallel import DistributedDataParallel as DDP

        self.trainable_module = DDP(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def compile(self, backend: str = 'inductor', mode: Optional[str] = None, **compile_kwargs) -> nn.Module:
        """Compile the training step and the evaluation model. Returns the latter."""
        module = self.trainable_module
        self.eval_model = torch.compile(module.model, backend=backend, mode=mode, **compile_kwargs)
        self.trainable_module = torch.compile(module, backend=backend, mode=mode, **compile_kwargs)
        return self.eval_model

    def get_eval_model(self, module: Optional[nn.Module] = None, ema: bool = False) -> Optional[nn.Module]:
        resolved = super().get_eval_model(module=module, ema=ema)
        if resolved is None:
            return None
        inner = unwrap_model(resolved)
        return inner.model if isinstance(inner, CoreTuningModule) else resolved

    def get_clip_parameters(self, exclude_head: bool = False):
        module = unwrap_model(self.trainable_module)
        excluded = {id(p) for p in classifier_parameters(module.model)} if exclude_head else set()
        return [p for p in module.parameters() if id(p) not in excluded]

    def get_task_state(self, module: Optional[nn.Module] = None, ema: bool = False) -> Dict[str, Any]:
        module = module if module is not None else self.get_trainable_module(ema=ema)
        if module is None:
            return {}
        criterion = unwrap_model(module).criterion
        state = {'generator': criterion.mixup.generator.get_state()}
        if criterion.projector is not None:
            state['projector'] = criterion.projector.state_dict()
        return state

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
        criterion = unwrap_model(module).criterion
        if strict and (criterion.projector is None) != ('projector' not in state):
            raise RuntimeError(
                'One of checkpoint and task has a projection head and the other has not. Resume with the '
                'contrast_weight the checkpoint was trained with, which is 0 for those without.'
            )
        if criterion.projector is not None and 'projector' in state:
            criterion.projector.load_state_dict(state['projector'], strict=strict)
        if 'generator' in state:
            criterion.mixup.generator.set_state(state['generator'])

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        """One training step's forward pass.

        Args:
            input: Images (B, 3, H, W).
            target: Class indices (B,) or soft targets (B, C).

        Returns:
            'loss' to minimise, 'task_loss' and (unless its weight is 0) 'contrast_loss', scalars; 'output', the logits
            of the clean images (B, C).

        Raises:
            ValueError: target does not fit the batch or the classes of the model.
        """
        module = unwrap_model(self.trainable_module)
        # images, or a dictionary of patches whose batch size the loss compares with that of target
        batch_size = input.shape[0] if isinstance(input, torch.Tensor) else len(target)
        check_target(target, batch_size, module.model.num_classes)
        batch, draws = module.criterion.prepare(batch_size, target.device)
        return self.trainable_module(input, target, batch, draws)
