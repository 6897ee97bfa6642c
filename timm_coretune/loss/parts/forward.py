"""Run a timm model so that one pass gives logits, the features before them, and feature maps on the way"""

import contextlib
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn


class ClassifierInput:
    """Forward pre-hook that keeps the input of the classifier, so that one pass gives features and logits."""

    def __init__(self) -> None:
        self.is_listening = False
        self.value: Optional[torch.Tensor] = None

    def __call__(self, module: nn.Module, args: Tuple[torch.Tensor, ...]) -> None:
        self.value = args[0]

    def listen_to(self, classifier: Any) -> Optional[torch.utils.hooks.RemovableHandle]:
        """Hook on to a classifier. Several classifiers have no input in common, and are left alone."""
        if not isinstance(classifier, nn.Module) or isinstance(classifier, nn.ModuleList):
            return None
        return classifier.register_forward_pre_hook(self)

    @contextlib.contextmanager
    def of(self, classifier: Any) -> Iterator[None]:
        """Listen to a classifier meanwhile. Between steps the model can be scripted, copied and pickled."""
        handle = None if self.is_listening else self.listen_to(classifier)
        if handle is None:
            yield
            return
        self.is_listening = True
        try:
            yield
        finally:
            handle.remove()
            self.is_listening, self.value = False, None


def features_and_logits(
    model: Any,
    input: Union[torch.Tensor, Dict[str, torch.Tensor]],
    feature_map: Optional[torch.Tensor],
    classifier_input: ClassifierInput,
    num_features: Optional[int],
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Pre-logits features (B, D) and logits (B, C).

    The features are the input of the classifier. If that does not have their shape (several classifiers, or a
    classifier on feature maps), they come from `forward_head(pre_logits=True)`, which runs the head once more.

    Args:
        model: A timm classifier.
        input: Its input.
        feature_map: What its `forward_features` gave. None for a dictionary, which only its own forward accepts.
        classifier_input: What listens to its classifier.
        num_features: Width D, None if any is accepted.
    """
    logits = model(input) if feature_map is None else model.forward_head(feature_map)
    features, classifier_input.value = classifier_input.value, None
    if not isinstance(logits, torch.Tensor):
        raise ValueError(
            f'Expected one tensor of logits from {type(model).__name__}, got {type(logits).__name__}. For a '
            'model with distillation heads call model.set_distilled_training(False).'
        )
    if isinstance(features, torch.Tensor):
        features = features.flatten(1)  # (B, D, 1, 1) if the classifier is a 1 x 1 convolution
    if features is None or features.shape[1] != (num_features or features.shape[1]):
        features = model.forward_head(feature_map, pre_logits=True)
    return features, logits


def forward_maps(model: Any, input: torch.Tensor, indices: Sequence[int]) -> Tuple[torch.Tensor, List[torch.Tensor]]:
    """What `forward_features` of a timm model returns, and averages of feature maps on the way, from one pass.

    Args:
        model: A timm model with `forward_intermediates`.
        input: Images (B, 3, H, W).
        indices: Indices of the maps, in increasing order.

    Returns:
        The last feature map, and an average over all places (B, D_l) for each index, in float32 or float64.
    """
    feature_map, maps = model.forward_intermediates(input, indices=list(indices), output_fmt='NCHW')
    return feature_map, [m.mean(dim=(2, 3), dtype=torch.promote_types(m.dtype, torch.float32)) for m in maps]


def classify(classifier: Callable[[torch.Tensor], torch.Tensor], features: torch.Tensor) -> torch.Tensor:
    """Logits (N, C) of features (N, D) by a classifier, which may be a 1 x 1 convolution."""
    if isinstance(classifier, nn.Conv2d):
        return classifier(features[:, :, None, None]).flatten(1)
    return classifier(features)
