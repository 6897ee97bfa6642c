"""The timm model of a run by its name, the weights that timm has for it, and a warning if training starts from none"""

import difflib
import logging
import re
from typing import Any, List, Optional

from timm.models import (
    get_pretrained_cfg,
    is_model,
    list_models,
    list_pretrained,
    parse_model_name,
    split_model_name_tag,
)

from ..checks import shorten
from .cli.settings import Settings

_logger = logging.getLogger(__name__)

# Words in the names of weights that were trained without labels of classes: by contrast with images or texts, by
# self-distillation, or by predicting what is masked. Those with `ft` or `lc` in their name learnt labels afterwards.
_SELF_SUPERVISED = re.compile(
    r'dino(v\d)?|seer|m?clip\d?|metaclip\d?|tinyclip|siglip2?|openai|laion.*|datacomp.*|dfn.*|webli|yfcc15m|cc12m|'
    r'lvd\d+m|sat493m|mae|fcmae|mim|ijepa|aimv2'
)
_WITH_LABELS = {'ft', 'lc'}
# arguments of timm.create_model that bring weights
_WITH_WEIGHTS = ('pretrained', 'checkpoint_path', 'pretrained_cfg')


def weights_of(architecture: str) -> List[str]:
    """Names of all weights that timm has of an architecture, as NAME.TAG."""
    return [name for name in list_pretrained(f'{architecture}*') if split_model_name_tag(name)[0] == architecture]


def is_self_supervised(name: str) -> bool:
    """Whether the name NAME.TAG of weights says that they were trained without labels of classes."""
    words = re.split(r'[._]', name)
    return any(map(_SELF_SUPERVISED.fullmatch, words)) and not _WITH_LABELS & set(words)


def check_model_name(name: str, pretrained: bool = False, flag: str = '--model') -> None:
    """Check that timm has a model of this name, and weights if they were asked for.

    Names with a source, such as hf-hub:OWNER/NAME, are not checked.

    Args:
        name: Name of a timm model, with or without the tag of weights.
        pretrained: Whether timm's weights are asked for.
        flag: The flag that gave the name.

    Raises:
        ValueError: There is no such model, or there are no such weights.
    """
    try:
        source, name = parse_model_name(name)
    except ValueError as e:
        raise ValueError(f'{flag}: {e}') from e
    if source is not None:
        return
    architecture, tag = split_model_name_tag(name)
    if not is_model(architecture):
        near = nearest_models(architecture)
        hint = f'Nearest: {", ".join(near)}' if near else "timm.list_models('*PART*') lists what there is"
        raise ValueError(f'{flag}: timm has no model {architecture!r}. {hint}.')
    known = weights_of(architecture)
    if tag and not _has_tag(architecture, tag):
        raise ValueError(f'{flag}: timm has no weights {tag!r} of {architecture}, but {shorten(known, 8) or "none"}.')
    if pretrained and not known:
        raise ValueError(
            f'--pretrained: timm has no weights of {architecture}. Give a checkpoint as --pretrained-path FILE, or '
            'leave --pretrained out to start from random weights.'
        )


def nearest_models(name: str, count: int = 4) -> List[str]:
    """Names of timm models that are similar to a name, or begin with it, or have a part of it."""
    name, known = name.lower(), list_models()
    longer = sorted((model for model in known if model.startswith(name)), key=len)[: count // 2]
    near = [*longer, *difflib.get_close_matches(name, known, n=count)]
    parts = [part for part in re.split(r'[\W_]+', name) if len(part) > 3]
    near = near or sorted((model for model in known if any(part in model for part in parts)), key=len)
    return list(dict.fromkeys(near))[:count]


def _has_tag(architecture: str, tag: str) -> bool:
    try:
        return get_pretrained_cfg(f'{architecture}.{tag}') is not None
    except RuntimeError:  # timm's answer to an unknown tag
        return False


def warn_of_random_weights(settings: Settings, resumed: Optional[str]) -> None:
    """Warn if a run starts from random weights, and name the weights that it could start from.

    Args:
        settings: The settings.
        resumed: Path of the training state that is continued.
    """
    model = settings.model
    given: List[Any] = [model.pretrained, model.pretrained_path, model.initial_checkpoint, resumed]
    if any(given) or any(model.model_kwargs.get(name) for name in _WITH_WEIGHTS):
        return
    what = 'RANDOM WEIGHTS ARE VALIDATED' if settings.loop.eval_only else 'TRAINING STARTS FROM RANDOM WEIGHTS'
    if settings.loss.task_loss == 'core':
        what += ', and Core-tuning is made for weights that were trained by contrast'
    _logger.warning(
        f'{what}: give --pretrained-path FILE for a self-supervised checkpoint, --pretrained for weights of timm, or '
        f'--initial-checkpoint FILE for weights with their classifier. {_describe_weights(model.model)}'
    )


def _describe_weights(name: str) -> str:
    """What timm has for a model, in a sentence or two."""
    kind, name = parse_model_name(name)
    if kind is not None:
        return f'--pretrained loads those of {kind}:{name}.'
    architecture = split_model_name_tag(name)[0]
    known = weights_of(architecture)
    without_labels = [weights for weights in known if is_self_supervised(weights)]
    with_labels = [weights for weights in known if weights not in without_labels]
    if not known:
        return f'timm itself has no weights of {architecture}.'
    if not without_labels:
        return f'timm has no self-supervised weights of {architecture}, but supervised ones: {shorten(with_labels)}.'
    text = f'Self-supervised weights of {architecture} in timm (--pretrained --model NAME): {shorten(without_labels)}.'
    return f'{text} Supervised ones: {shorten(with_labels, 3)}.' if with_labels else text
