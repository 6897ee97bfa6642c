"""Compute a loss inside the forward pass of a model of transformers

DistributedDataParallel looks for parameters without gradient in what the forward pass returns, so the loss must be in
it. While the model trains, the loss is a submodule of it, and so is moved, wrapped and given to the optimizer with it.
No state of the model holds the loss.
"""

import contextlib
from typing import Any, Dict, Iterator, Optional, Tuple

import torch
import torch.nn as nn

from ..loss import TaskLoss
from ..loss.parts.forward import ClassifierInput, classify
from ..timm_model import get_feature_dim

NAME = 'coretune'  # of the submodule, and of the argument of the forward pass
_TOLERANCE = 0.05  # greatest difference of logits that were rounded to half precision, as a share of the greatest logit


def find_classifier(model: nn.Module, name: Optional[str] = None) -> Tuple[nn.Module, int]:
    """The last layer of a model for image classification, and the width of its input.

    Args:
        model: A model of transformers.
        name: Name of the layer. When None, it is the classifier of timm if the model wraps one of timm, otherwise the
            last nn.Linear or nn.Conv2d with an output for each label.

    Raises:
        ValueError: There is no such layer.
    """
    timm_model = getattr(model, 'timm_model', None)
    if name is None and timm_model is not None:
        return timm_model.get_classifier(), get_feature_dim(timm_model)
    num_labels = getattr(getattr(model, 'config', None), 'num_labels', None)
    layers = {n: part for n, part in model.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d))}
    fits = [n for n, part in layers.items() if part.weight.shape[0] == num_labels]
    if name is not None:
        fits = [n for n in layers if n == name]
    if not fits:
        raise ValueError(
            f'Expected a model for image classification, whose last layer is nn.Linear or nn.Conv2d with '
            f'{num_labels} outputs (config.num_labels), got {type(model).__name__} without '
            f"{'one' if name is None else f'the layer {name!r}'}. Pass classifier='<name of the layer>', one of "
            f'{", ".join(list(layers)[-3:])}.'
        )
    return layers[fits[-1]], layers[fits[-1]].weight.shape[1]


class LossInForward:
    """Adds the loss of a batch to what the forward pass of a model returns, if it is given a target.

    Args:
        model: A model of transformers, which returns a ModelOutput with `logits`.
        criterion: The loss.
        classifier: The layer of the model whose output are the logits. Its input are the features.

    Attributes:
        losses: The loss of the last batch and its parts.
    """

    def __init__(self, model: nn.Module, criterion: TaskLoss, classifier: nn.Module):
        self.model = model
        self.criterion = criterion
        self.classifier = classifier
        self.losses: Dict[str, torch.Tensor] = {}
        self._input = ClassifierInput()
        self._given: Any = None
        self._has_compared = False

    def __call__(self, wrapped: nn.Module, inputs: Dict[str, Any], target: torch.Tensor, *prepared: Any) -> Any:
        """Outputs of the model with 'loss'. `wrapped` is the model in its wrappers."""
        with self._input.of(self.classifier):
            return wrapped(**inputs, **{NAME: (target, *prepared)})

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Make the loss a part of the model meanwhile."""
        self.model.add_module(NAME, self.criterion)
        handles = [
            self.model.register_forward_pre_hook(self._take_target, prepend=True, with_kwargs=True),
            self.model.register_forward_hook(self._add_losses),
            self.model.register_state_dict_post_hook(_leave_out),
            self.model.register_load_state_dict_post_hook(_miss_nothing),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            delattr(self.model, NAME)

    def _take_target(self, module: nn.Module, args: Any, kwargs: Dict[str, Any]) -> Tuple[Any, Dict[str, Any]]:
        kwargs = dict(kwargs)
        self._given = kwargs.pop(NAME, None)
        return args, kwargs

    def _add_losses(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._given is None:
            return None
        (target, *prepared), self._given = self._given, None
        features, self._input.value = self._input.value, None
        if features is None or not hasattr(output, 'logits'):
            raise RuntimeError(
                f'Expected {type(module).__name__} to call its classifier {type(self.classifier).__name__} and to '
                f'return logits by name, got {type(output).__name__}. Pass classifier=, and leave return_dict of the '
                'config at True.'
            )
        features, logits = features.flatten(1), output.logits
        self._compare(features, logits)
        self.criterion.check_shapes(features, logits)
        further: Dict[str, Any] = {'classifier': self.classifier} if 'classifier' in self.criterion.requires else {}
        self.losses = self.criterion.compute(features, logits, target, *prepared, **further)
        # wrappers rebuild the output from its fields, among which there is no other loss
        return type(output)(**{**output, 'loss': self.losses['loss']})

    @torch.no_grad()
    def _compare(self, features: torch.Tensor, logits: torch.Tensor) -> None:
        """Raise a RuntimeError unless these are the features. It waits for the device, in the first step only."""
        if self._has_compared or not isinstance(self.classifier, (nn.Linear, nn.Conv2d)):
            return
        self._has_compared = True
        weight = self.classifier.weight
        if features.shape[1] == weight.shape[1]:
            expected = classify(self.classifier, features.to(weight.dtype))
            self._input.value = None
            largest = _TOLERANCE * expected.abs().max()
            if expected.shape == logits.shape and (expected - logits).abs().max() <= largest:
                return
        raise RuntimeError(
            f'Expected logits {tuple(logits.shape)} that are the output of {self.classifier}, got others. Pass '
            "classifier='<name of the layer that computes the logits>', or use another model."
        )


def _leave_out(module: nn.Module, state: Dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [name for name in state if name.startswith(f'{prefix}{NAME}.')]:
        del state[name]


def _miss_nothing(module: nn.Module, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if not name.startswith(f'{NAME}.')]
