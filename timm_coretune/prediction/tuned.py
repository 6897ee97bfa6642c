"""What fine_tune returns: the epochs, and the tuned model with its classes and the preparation of its images"""

import math
from collections.abc import Sequence as SequenceOfItems
from typing import Any, Dict, List, Optional, Sequence, Union

import torch
import torch.nn as nn
from timm.utils import unwrap_model

from ..evaluation.scores import SCORES
from ..export import export_model
from ..hub import push_to_hub
from ..hub.card import CardFacts
from .classifier import Classifier
from .predictor import ImageLike, Prediction, Predictor


class FineTuned(SequenceOfItems):
    """The epochs of a run as dictionaries, in a sequence that also classifies images, and saves and pushes the model.

    Args:
        model: The tuned classifier, with the weights of its last epoch.
        epochs: Dictionaries of the validated epochs.
        class_names: Names of the classes by index, None if they are not known.
        data_config: Preparation of images, as timm.data.create_transform takes it. None if it is not known.

    Raises:
        ValueError: There are not as many names as classes.
    """

    def __init__(
        self,
        model: nn.Module,
        epochs: List[Dict[str, Any]],
        class_names: Optional[Sequence[str]] = None,
        data_config: Optional[Dict[str, Any]] = None,
    ):
        self.model: Any = unwrap_model(model)
        self.epochs = epochs
        self.class_names = None if class_names is None else [str(name) for name in class_names]
        self.data_config = data_config
        check_names(model, self.class_names)

    def __len__(self) -> int:
        return len(self.epochs)

    def __getitem__(self, index: Any) -> Any:
        return self.epochs[index]

    def __repr__(self) -> str:
        last = '' if not self.epochs else f', the last one: {self.epochs[-1]}'
        return f'{type(self).__name__} of {len(self.epochs)} validated epochs{last}'

    def _preparation(self) -> Dict[str, Any]:
        if self.data_config is None:
            raise ValueError(
                'Expected to know how images are prepared: the data sets of the loaders have no transform that timm '
                "can repeat. Set data_config = dict(input_size=(3, H, W), mean=..., std=..., interpolation='bilinear', "
                "crop_pct=1.0, crop_mode='center'), here or as an argument of fine_tune."
            )
        return self.data_config

    def predict(
        self,
        images: Union[ImageLike, torch.Tensor, Sequence[Union[ImageLike, torch.Tensor]]],
        topk: int = 5,
        batch_size: int = 64,
    ) -> List[Prediction]:
        """Classify images.

        Args:
            images: Paths or images of PIL, prepared as data_config says. Or tensors as the loaders give them: one of
                shape (C, H, W), or several.
            topk: Number of classes of a prediction.
            batch_size: Number of images that are computed at once.

        Returns:
            A prediction for each image. One that cannot be read has no label, but the reason.

        Raises:
            ValueError: There are paths or images of PIL, and it is not known how they are prepared.
        """
        listed = images if isinstance(images, (list, tuple)) else [images]
        prepared = all(isinstance(image, torch.Tensor) for image in listed)
        data_config = {'input_size': (3, 1, 1)} if prepared else self._preparation()
        device = next(self.model.parameters()).device
        names = self.class_names or [str(index) for index in range(self.model.num_classes)]
        classifier = Classifier(self.model, data_config, names, multi_label=False)
        was_training = self.model.training
        self.model.eval()
        try:
            return Predictor(classifier, device, batch_size, topk=topk)(images)
        finally:
            self.model.train(was_training)

    def save(self, folder: str) -> None:
        """Write a folder that `timm.create_model('local-dir:FOLDER', pretrained=True)` and Predictor load.

        Raises:
            ValueError: It is not known how images are prepared.
        """
        export_model(self.model, folder, self._preparation(), self.class_names)

    def push(self, repo_id: str, facts: Optional[CardFacts] = None, **kwargs: Any) -> str:
        """Push the model to the Hub, see `push_to_hub`.

        Args:
            repo_id: Repository as owner/name.
            facts: Facts for the model card. When None the scores of the last epoch.
            **kwargs: Further arguments of push_to_hub, such as private.

        Returns:
            Web address of the commit.

        Raises:
            HubError: Nothing was pushed.
            ValueError: It is not known how images are prepared.
        """
        last = (self.epochs[-1]['validation'] if self.epochs else None) or {}
        facts = facts or CardFacts(metrics={key: last[key] for key in SCORES if math.isfinite(last.get(key, math.nan))})
        return push_to_hub(self.model, repo_id, self._preparation(), self.class_names, facts, **kwargs)


def check_names(model: nn.Module, names: Optional[Sequence[str]]) -> None:
    """Raise a ValueError if a model has another number of classes than names."""
    num_classes = getattr(unwrap_model(model), 'num_classes', None)
    if names is not None and num_classes is not None and len(names) != num_classes:
        raise ValueError(
            f'Expected a name for each of the {num_classes} classes of the model, got {len(names)}. Create the model '
            f'with num_classes={len(names)}, or give other class_names.'
        )
