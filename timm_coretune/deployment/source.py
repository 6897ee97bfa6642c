"""Load a tuned model to be exported, with what a user of the exported file has to know"""

import json
import os
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union, cast

import torch
import torch.nn as nn

from ..checks import clip
from ..prediction.classifier import is_segmentation, load_classifier
from ..segmentation import SegmentationModel, load_segmentation_model
from ..version import __version__


class Source(NamedTuple):
    """A model to export.

    Attributes:
        model: The timm model or segmentation model, in evaluation mode, in float32 on the CPU.
        data_config: Preparation of its images. Its input_size is that of the exported file.
        class_names: Names of the classes by index, None if not known.
        multi_label: Whether an image may have several labels.
    """

    model: Any
    data_config: Dict[str, Any]
    class_names: Optional[List[str]]
    multi_label: bool

    @property
    def segmentation(self) -> bool:
        return isinstance(self.model, SegmentationModel)


class WithPreprocessing(nn.Module):
    """Takes pixels as they are in a file, and returns probabilities.

    Args:
        model: Takes normalised images and returns logits.
        mean: Mean of each channel, for pixels from 0 to 1.
        std: Deviation of each channel.
        multi_label: Whether each class has a probability of its own.
    """

    def __init__(self, model: nn.Module, mean: Tuple[float, ...], std: Tuple[float, ...], multi_label: bool = False):
        super().__init__()
        self.model = model
        self.multi_label = multi_label
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer('mean', torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer('std', torch.tensor(std).view(-1, 1, 1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Probabilities (B, C), or (B, C, H, W) of pixels, for images uint8 (B, 3, H, W)."""
        logits = self.model((image.float() / 255 - self.mean) / self.std)
        return logits.sigmoid() if self.multi_label else logits.softmax(dim=1)


def load_source(source: Union[str, os.PathLike], img_size: Optional[Tuple[int, int]] = None) -> Source:
    """Load a tuned model.

    Args:
        source: Output folder of train.py, folder of an exported model, or `hf-hub:owner/name[@revision]`.
        img_size: Height and width of the images. When None those of the validation.

    Raises:
        ValueError: There is no such model, or it takes no images of this size.
    """
    if is_segmentation(os.fspath(source)):
        model = load_segmentation_model(source)
        size = img_size or model.img_size
        data_config = {**model.data_config, 'input_size': (len(model.data_config['mean']), *size)}
        loaded = Source(model, data_config, model.class_names, False)
    else:
        model, data_config, class_names, multi_label = load_classifier(source)
        size = img_size or data_config['input_size'][1:]
        data_config = {**data_config, 'input_size': (data_config['input_size'][0], *size)}
        loaded = Source(model, data_config, class_names, multi_label)
    loaded.model.float().requires_grad_(False)
    try:
        if img_size is not None and hasattr(loaded.model, 'set_input_size'):
            loaded.model.set_input_size(img_size=size)  # a transformer resizes its position embeddings
        with torch.no_grad():
            loaded.model(torch.zeros(1, *data_config['input_size']))
    except Exception as e:  # models raise errors of many kinds for a size that they do not take
        raise ValueError(
            f'Expected a size that the model takes as --img-size, got {" x ".join(map(str, size))}: {clip(str(e))}. '
            'Leave it out for that of the training.'
        ) from e
    return loaded


def describe(source: Source, with_preprocessing: bool) -> Dict[str, str]:
    """What a user of the exported file has to know, as texts by name. Values that are no text are JSON."""
    config = source.data_config
    pretrained = cast(Dict[str, Any], source.model.pretrained_cfg)
    values = dict(
        task='segmentation' if source.segmentation else 'multilabel' if source.multi_label else 'classification',
        architecture=pretrained.get('architecture'),
        class_names=source.class_names,
        input='uint8 pixels of 0 to 255' if with_preprocessing else 'pixels / 255, minus mean, divided by std',
        output='probabilities' if with_preprocessing else 'logits',
        input_size=list(config['input_size']),
        mean=list(config['mean']),
        std=list(config['std']),
        interpolation=config['interpolation'],
        crop_pct=config.get('crop_pct'),
        crop_mode=config.get('crop_mode'),
        timm_coretune=__version__,
    )
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in values.items()
        if value is not None
    }
