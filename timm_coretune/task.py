"""Core-tuning task

Everything trainable runs inside one call of one module, so that DistributedDataParallel, autocast and torch.compile
cover it. Checks of the target and random draws stay outside, since a compiled graph can contain neither.
"""

import contextlib
import logging
from typing import Any, ContextManager, Dict, Iterable, List, NamedTuple, Optional, Sequence, Set, Tuple, Union, cast

import torch
import torch.nn as nn
from timm.task import TrainingTask
from timm.task.evaluator import ClassificationEvaluator, MultiLabelClassificationEvaluator
from timm.utils import unwrap_model

from .loss import TaskLoss, create_method
from .loss.parts.bank import Bank
from .loss.parts.forward import ClassifierInput, features_and_logits, forward_maps
from .mixup import protect_draws
from .timm_model import (
    GroupMatcher,
    check_classifier,
    classifier_parameters,
    get_classifiers,
    get_feature_dim,
    group_matcher,
    no_weight_decay,
)

_logger = logging.getLogger(__name__)


class FeaturesAndLogits(NamedTuple):
    """What the loss of a batch is computed from. CachedStep gets it for a part of a batch, and gives it for the whole.

    Attributes:
        features: Pre-logits features (B, D).
        logits: Logits (B, C).
        loss_parameters: Views of the parameters that the loss uses. A gradient that is given to them in a backward pass
            reaches the parameters, as if the loss had been computed in this forward pass.
    """

    features: torch.Tensor
    logits: torch.Tensor
    loss_parameters: Sequence[torch.Tensor] = ()


class CoreTuningModule(nn.Module):
    """Model and criterion in one module, which is wrapped, compiled and given to the optimizer.

    In training mode it returns losses, in evaluation mode the output of the model. `CachedStep` calls it in training
    mode with images and no target, which returns FeaturesAndLogits, and with those in place of images, which returns
    the losses.

    Args:
        model: A timm classifier.
        criterion: The loss. Its parameters are trained together with the model.
    """

    def __init__(self, model: nn.Module, criterion: TaskLoss):
        super().__init__()
        self.model: Any = model
        self.criterion = criterion
        self._classifier_input = ClassifierInput()
        # DistributedDataParallel sends all buffers about in every step, but a bank is large, and the same everywhere
        banks = {name: part for name, part in self.named_modules() if isinstance(part, Bank)}
        self._ddp_params_and_buffers_to_ignore = [
            f'{name}.{buffer}' for name, bank in banks.items() for buffer, _ in bank.named_buffers()
        ]

    def no_weight_decay(self) -> Set[str]:
        return no_weight_decay(self.model, 'model.')

    def group_matcher(self, coarse: bool = False) -> GroupMatcher:
        return group_matcher(self.model, 'model.', coarse=coarse)

    def listening(self) -> ContextManager[None]:
        """Keep the input of the classifier meanwhile. Around a compiled step, which cannot do so by itself."""
        return self._classifier_input.of(self.model.get_classifier())

    def forward_maps(
        self,
        input: Union[torch.Tensor, Dict[str, torch.Tensor]],
    ) -> Tuple[Optional[torch.Tensor], Optional[List[torch.Tensor]]]:
        """What goes into the head of the model, if its input is a tensor, and the maps that the loss requires."""
        if 'maps' not in self.criterion.requires:
            # only the model's own forward accepts a dictionary of patches and coordinates
            return None if isinstance(input, dict) else self.model.forward_features(input), None
        if isinstance(input, dict):
            raise ValueError(
                f'Expected images (B, 3, H, W), of which {type(self.criterion).__name__} compares feature maps, got a '
                f'dictionary with {", ".join(input)}. Use a loader of images of one size, or another loss.'
            )
        return forward_maps(self.model, input, self.criterion.map_indices)

    def forward_features_and_logits(
        self,
        input: Union[torch.Tensor, Dict[str, torch.Tensor]],
        feature_map: Optional[torch.Tensor],
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Pre-logits features (B, D) and logits (B, C), given what `forward_maps` returned for the input."""
        with contextlib.nullcontext() if torch.compiler.is_compiling() else self.listening():
            return features_and_logits(
                self.model, input, feature_map, self._classifier_input, self.criterion.num_features
            )

    def required(
        self,
        input: Union[torch.Tensor, Dict[str, torch.Tensor]],
        maps: Optional[List[torch.Tensor]] = None,
    ) -> Dict[str, Any]:
        """The further arguments that the loss requires."""
        given: Dict[str, Any] = {'input': input, 'model': self.model, 'maps': maps}
        if 'classifier' in self.criterion.requires:
            given['classifier'] = self.model.get_classifier()
        return {name: given[name] for name in self.criterion.requires}

    def loss_parameters(self) -> List[nn.Parameter]:
        """Parameters that get gradients in the loss: its own, and those of the classifier if it requires that."""
        modules: List[nn.Module] = [self.criterion]
        if 'classifier' in self.criterion.requires:
            modules += get_classifiers(self.model)
        return [p for module in modules for p in module.parameters() if p.requires_grad]

    def forward(
        self,
        input: Any,
        target: Optional[torch.Tensor] = None,
        *prepared: Any,
    ) -> Any:
        if not self.training:
            return self.model(input)
        if isinstance(input, FeaturesAndLogits):
            features, logits, further = input.features, input.logits, self.required({})
        else:
            feature_map, maps = self.forward_maps(input)
            features, logits = self.forward_features_and_logits(input, feature_map)
            if target is None:
                return FeaturesAndLogits(features, logits, [p.view_as(p) for p in self.loss_parameters()])
            further = self.required(input, maps)
        self.criterion.check_shapes(features, logits)
        losses = self.criterion.compute(features, logits, cast(torch.Tensor, target), *prepared, **further)
        return {**losses, 'output': logits}


class CoreTuningTask(TrainingTask):
    """Fine-tunes a timm classifier with a loss on its features and logits, by default that of Core-tuning.

    The evaluation model and the weights in checkpoints are those of the plain timm model. The state of the loss
    (projection head, random generator) is saved apart from them, as task state.

    A loop should call `attach_optimizer(optimizer)` and `start(num_updates)` before the first step, and
    `after_update()` after each optimizer step. The Core-tuning loss needs none of them, but other losses do.

    Args:
        model: A timm classifier with num_classes > 0.
        criterion: The loss, or its name in timm_coretune.loss.METHODS, such as 'scl'. When None, a CoreTuningLoss.
        device: Device for task tensors and the parameters of the loss.
        dtype: Dtype of the parameters of the loss. It should be that of the model, None for float32.
        verbose: Enable info logging.
        **loss_kwargs: Arguments of the loss except num_features, which follows from the model.

    Raises:
        ValueError: The model is not a classifier, an argument of the loss is out of range, or both criterion and
            loss_kwargs are given.

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
        criterion: Union[TaskLoss, str, None] = None,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
        verbose: bool = True,
        **loss_kwargs: Any,
    ):
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        plain_model = unwrap_model(model)
        self.check_model(plain_model)
        if criterion is None or isinstance(criterion, str):
            criterion = create_method(criterion or 'core', self.get_feature_dim(plain_model), **loss_kwargs)
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
        """Width D of the features that the loss gets."""
        return get_feature_dim(model)

    def create_module(self, model: nn.Module, criterion: TaskLoss) -> CoreTuningModule:
        """Create the module that contains everything trainable."""
        return CoreTuningModule(model, criterion)

    @property
    def criterion(self) -> TaskLoss:
        return unwrap_model(self.trainable_module).criterion

    @property
    def is_global_mean(self) -> bool:
        """Whether the loss, averaged over processes, is the mean over all images even if batches differ in size."""
        return self.criterion.is_global_mean

    @property
    def multi_label(self) -> bool:
        """Whether images may have several labels."""
        return self.criterion.multi_label

    def create_evaluator(self, **kwargs: Any) -> Any:
        """Create timm's evaluator of the outputs of the evaluation model, with further arguments of the evaluator."""
        kind = MultiLabelClassificationEvaluator if self.multi_label else ClassificationEvaluator
        return kind(self.device, **kwargs)

    def attach_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the loss hook on to the optimizer. Call this before the first optimizer step."""
        module = unwrap_model(self.trainable_module)
        module.criterion.attach_optimizer(optimizer, module.model)

    def start(self, num_updates: int) -> None:
        """Tell the loss how many optimizer steps the whole run has. Call this before the first one."""
        self.criterion.start(num_updates)

    def after_update(self) -> None:
        """Tell the loss that the weights were updated. Call this after each optimizer step."""
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
        """Compile the training step and the evaluation model. Returns the compiled evaluation model."""
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

    def forward(
        self,
        input: Union[torch.Tensor, Dict[str, torch.Tensor]],
        target: torch.Tensor,
    ) -> Dict[str, torch.Tensor]:
        """One training step's forward pass.

        Args:
            input: Images (B, 3, H, W), or patches in a dictionary, each of whose tensors has a row for each image.
            target: Class indices (B,) or soft targets (B, C). With a loss for several labels, multi-hot targets (B, C).

        Returns:
            Scalars in nats: 'loss' to minimise and its parts, for Core-tuning 'task_loss' and, unless its weight is 0,
            'contrast_loss'. In addition 'output', the logits of the clean images (B, C).

        Raises:
            ValueError: target does not fit the batch or the classes of the model.
        """
        module = unwrap_model(self.trainable_module)
        batch_size = (input if isinstance(input, torch.Tensor) else next(iter(input.values()))).shape[0]
        module.criterion.check_target(target, batch_size, module.model.num_classes)
        module.criterion.check_updates(module.model)
        prepared = protect_draws(module.criterion.prepare(batch_size, target.device))
        with module.listening():
            return self.trainable_module(input, target, *prepared)
