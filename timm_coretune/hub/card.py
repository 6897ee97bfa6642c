"""The model card: the page of a model on the Hugging Face Hub, with its origin, data, scores, recipe and usage"""

import dataclasses
import logging
import math
from dataclasses import dataclass, field
from typing import Any, Dict, Mapping, Optional, Sequence

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..checks import clip
from ..evaluation.scores import SCORES, Score
from ..loss import METHODS, resolve_method

_logger = logging.getLogger(__name__)

TAG = 'coretune'
REPOSITORY = 'https://github.com/timm-coretune/timm_coretune'
_NUM_NAMES = 30  # classes that a card names, of more the first
CLASSIFICATION, SEGMENTATION = 'image-classification', 'image-segmentation'
# Options of train.py that a card shows. Those under a key have an effect only together with the option of that name, or
# those under contrasts with a method that contrasts.
# args.yaml has all options.
_RECIPE = {
    None: (
        *('model', 'model_kwargs', 'pretrained', 'pretrained_path', 'initial_checkpoint', 'img_size', 'input_size'),
        *('preset', 'epochs', 'batch_size', 'global_batch_size', 'grad_accum_steps'),
        *('opt', 'lr', 'weight_decay', 'layer_decay'),
        *('clip_grad', 'sched', 'warmup_epochs', 'freeze_epochs', 'head_lr_scale', 'smoothing', 'mixup', 'cutmix'),
        *('loss', 'loss_class_weight', 'loss_pos_weight', 'stop_epoch'),
        *('aa', 'reprob', 'drop', 'drop_path', 'class_balance', 'label_fraction', 'seed', 'task'),
    ),
    'coretune': (
        *('coretune', 'coretune_alpha', 'coretune_min_positive_lam', 'coretune_min_negative_lam', 'coretune_smooth'),
        *('coretune_smooth_weight', 'coretune_mixtures', 'coretune_positive_candidates'),
    ),
    'method': ('method', 'method_kwargs'),
    'contrasts': (
        'contrast_batch_size',
        'contrast_weight',
        'contrast_temperature',
        'projection_dim',
        'no_coretune_gather',
    ),
    'segmentation': ('segmentation', 'segmentation_head', 'anchors_per_image', 'reduce_zero_label'),
    'lora_rank': ('lora_rank', 'lora_alpha'),
    'model_ema': ('model_ema', 'model_ema_decay', 'model_ema_warmup'),
    'amp': ('amp', 'amp_dtype'),
}
# end of the usage of a classifier whose images have several labels
_PRINT_SEVERAL = """names = model.pretrained_cfg.get('label_names') or range(len(probabilities))
print({name: float(p) for name, p in zip(names, probabilities, strict=True)})
```"""
# values with which an option has no effect, so that a card does not show it
_WITHOUT_EFFECT = {'grad_accum_steps': 1, 'head_lr_scale': 1, 'label_fraction': 1, 'task': 'classification'}
_USAGE = {
    CLASSIFICATION: """```python
import timm
import torch
from PIL import Image, ImageOps

model = timm.create_model('hf-hub:REPO_ID', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
image = ImageOps.exif_transpose(Image.open('image.png')).convert('MODE')
with torch.inference_mode():
    probabilities = model(transform(image)[None]).softmax(dim=-1)[0]
index = int(probabilities.argmax())
names = model.pretrained_cfg.get('label_names')
print(names[index] if names else index, float(probabilities[index]))
```""",
    SEGMENTATION: """The head is not one of timm: [timm_coretune](REPOSITORY) loads it.

```bash
pip install timm-coretune
```

```python
import timm_coretune
from PIL import Image
from timm_coretune.segmentation import predict_image

model = timm_coretune.load_segmentation_model('hf-hub:REPO_ID').eval()
image = Image.open('image.png')
classes = predict_image(model, image)  # class indices (height, width) of the image, uint8
Image.fromarray(classes.numpy()).save('mask.png')
```

For many images, from a shell:

```
python -m timm_coretune.segmentation predict hf-hub:REPO_ID IMAGES --output MASKS
```

The backbone alone needs plain timm only:

```python
import timm

backbone = timm.create_model('hf-hub:REPO_ID', pretrained=True, num_classes=0)
```""",
}
# PIL mode of images by their number of channels
_MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}
_CHOSEN_ON_THE_SAME_IMAGES = (
    'The epoch of these weights is the best one on the images that the figures are measured on, so these figures are '
    'optimistic. The last epoch was not chosen by its figures.'
)
_CITATION = """```bibtex
@inproceedings{zhang2021unleashing,
  title={Unleashing the Power of Contrastive Self-Supervised Visual Models via Contrast-Regularized Fine-Tuning},
  author={Zhang, Yifan and Hooi, Bryan and Hu, Dapeng and Liang, Jian and Feng, Jiashi},
  booktitle={Advances in Neural Information Processing Systems},
  year={2021},
  url={https://arxiv.org/abs/2102.06605}
}
```"""


@dataclass(frozen=True)
class CardFacts:
    """The facts that a model card shows. A card leaves out facts that are not given.

    Attributes:
        dataset: Name of the training data, or `owner/name` for a data set on the Hub.
        dataset_split: Name of the split that the metrics were computed on.
        base_model: Model that was tuned, as `owner/name` on the Hub.
        start: What was tuned, in words, if it is not on the Hub.
        license: Licence of the weights as the Hub calls it, such as apache-2.0.
        weights: Which weights of the run these are, in words.
        metrics: Scores of the weights by their names in SCORES, such as top1 in percent.
        last_metrics: Scores of the weights after the last epoch, by their names in SCORES.
        recipe: Options of train.py by name.
        segmentation: Content of segmentation.json for a segmentation model, None for a classifier.
        pictures: Names of the pictures in the repository that the card shows, with what each shows.
    """

    dataset: Optional[str] = None
    dataset_split: Optional[str] = None
    base_model: Optional[str] = None
    start: Optional[str] = None
    license: Optional[str] = None
    weights: Optional[str] = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    last_metrics: Mapping[str, float] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    segmentation: Optional[Mapping[str, Any]] = None
    pictures: Mapping[str, str] = field(default_factory=dict)

    @property
    def task(self) -> str:
        """Task of the model as the Hub calls it, such as image-classification."""
        return CLASSIFICATION if self.segmentation is None else SEGMENTATION


def _plain(value: Any) -> Any:
    """Numbers and lists of Python in place of those of numpy and torch, also inside lists and mappings."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.tolist() if hasattr(value, 'tolist') else value


def _numbers(scores: Mapping[str, Any]) -> Dict[str, float]:
    """Scores as finite numbers. The others are left out, and the log says so."""
    numbers = {}
    for name, score in _plain(scores).items():
        while isinstance(score, list) and len(score) == 1:
            score = score[0]
        try:
            number = float(score)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            numbers[name] = number
        else:
            _logger.warning(f'The card leaves out {name}, since {score!r} is no finite number.')
    return numbers


def is_card_of(text: str, architecture: str) -> bool:
    """Whether the text of a card was written by this package for a model of this architecture."""
    try:
        tags = ModelCard(text, ignore_metadata_errors=True).data.get('tags') or []
    except (ValueError, yaml.YAMLError):  # the card has no metadata, or broken ones
        return False
    return TAG in tags and architecture in tags


def create_card(repo_id: str, config: Dict[str, Any], facts: CardFacts) -> ModelCard:
    """Write the card of a model.

    Args:
        repo_id: Repository on the Hub, as owner/name.
        config: Content of config.json, which describes a classifier or the backbone of a segmentation model.
        facts: Further facts to show on the card.
    """
    facts = dataclasses.replace(
        facts,
        metrics=_numbers(facts.metrics),
        last_metrics=_numbers(facts.last_metrics),
        recipe=_plain(facts.recipe),
        segmentation=_plain(facts.segmentation),
    )
    architecture = config['architecture']
    results = [
        EvalResult(
            task_type=facts.task,
            dataset_type=facts.dataset,
            dataset_name=facts.dataset,
            dataset_split=facts.dataset_split,
            metric_type=score.hub_type,
            metric_name=_column_title(score),
            metric_value=round(facts.metrics[key], 4),
        )
        for key, score in SCORES.items()
        if facts.dataset and key in facts.metrics
    ]
    data = ModelCardData(
        library_name='timm',
        pipeline_tag=facts.task,
        tags=[facts.task, 'timm', TAG, architecture],
        license=facts.license,
        base_model=facts.base_model,
        datasets=[facts.dataset] if facts.dataset and '/' in facts.dataset else None,
        metrics=[result.metric_type for result in results] or None,
        model_name=repo_id.split('/')[-1],
        eval_results=results or None,
    )
    sections = [
        _describe(repo_id, config, facts),
        f'## How to use\n\n{_usage(repo_id, config, facts)}',
        _figures(facts),
        '\n\n'.join(f'![{what}]({name})' for name, what in facts.pictures.items()),
        _recipe(facts),
        f'## Citation\n\n{_CITATION}',
    ]
    return ModelCard(f'---\n{data.to_yaml()}\n---\n\n' + '\n\n'.join(filter(None, sections)) + '\n')


def _usage(repo_id: str, config: Dict[str, Any], facts: CardFacts) -> str:
    mode = _MODES.get(config['pretrained_cfg']['input_size'][0])
    text = _USAGE[facts.task]
    if facts.recipe.get('task') == 'multilabel':
        text = text[: text.index('index = ')].replace('softmax(dim=-1)', 'sigmoid()') + _PRINT_SEVERAL
    text = text.replace(".convert('MODE')", f'.convert({mode!r})' if mode else '')
    return text.replace('REPO_ID', repo_id).replace('REPOSITORY', REPOSITORY)


def _describe(repo_id: str, config: Dict[str, Any], facts: CardFacts) -> str:
    method = _method(facts.recipe)
    how = 'Core-tuned' if method == 'core' or not facts.recipe else f'Fine-tuned with {method or "cross-entropy"}'
    start = f'[{facts.base_model}](https://huggingface.co/{facts.base_model})' if facts.base_model else facts.start
    used = config['pretrained_cfg']
    size, crop = used['input_size'], f', crop {used["crop_pct"]}'
    kind, architecture, num_classes = 'image classifier', f'`{config["architecture"]}`', config['num_classes']
    if facts.segmentation is not None:
        used = facts.segmentation
        size, crop = (size[0], *used['img_size']), ''
        kind, num_classes = 'backbone with a segmentation head', used['num_classes']
        architecture += f' with a `{used["head"]}` head'
    lines = [
        f'# {repo_id.split("/")[-1]}',
        '',
        f'A [timm](https://github.com/huggingface/pytorch-image-models) {kind}. {how} with '
        f'[timm_coretune]({REPOSITORY}).',
        '',
        f'- Architecture: {architecture}, {num_classes} classes',
        f'- Input: {" x ".join(map(str, size))}, mean {list(used["mean"])}, std {list(used["std"])}, '
        f'{used["interpolation"]} interpolation{crop}',
    ]
    names = config.get('label_names') if facts.segmentation is None else facts.segmentation.get('class_names')
    for name, value in (
        ('Classes', _list_names(names or [])),
        ('Tuned from', start),
        ('Data', f'`{facts.dataset}`' if facts.dataset else None),
        ('Weights', facts.weights),
        ('Licence', facts.license or 'not stated. See the licences of the original model and of the training data'),
    ):
        if value:
            lines.append(f'- {name}: {value}')
    return '\n'.join(lines)


def _list_names(names: Sequence[Any]) -> str:
    """Names of classes in one line of Markdown, of many the first."""
    shown = [f'`{clip(str(name)).replace("`", chr(39))}`' for name in names[:_NUM_NAMES]]
    more = f' and {len(names) - _NUM_NAMES} more, all in the config' if len(names) > _NUM_NAMES else ''
    return ', '.join(shown) + more


def _column_title(score: Score) -> str:
    return f'{score.title} ({score.unit})'


def _figures(facts: CardFacts) -> Optional[str]:
    rows = [(_column_title(score), key) for key, score in SCORES.items() if key in facts.metrics]
    if not rows:
        return None
    with_last = bool(facts.last_metrics)
    lines = [
        '## Figures',
        '',
        f'Measured on the {facts.dataset_split} split.' if facts.dataset_split else 'Measured on held-out images.',
        '',
        '| | these weights |' + (' last epoch |' if with_last else ''),
        '|---|---|' + ('---|' if with_last else ''),
    ]
    for name, key in rows:
        last = f' {facts.last_metrics[key]:.4g} |' if with_last and key in facts.last_metrics else ''
        lines.append(f'| {name} | {facts.metrics[key]:.4g} |{last}')
    if with_last:
        lines += ['', _CHOSEN_ON_THE_SAME_IMAGES]
    return '\n'.join(lines)


def _method(recipe: Mapping[str, Any]) -> Optional[str]:
    """Name of the method in METHODS, None for cross-entropy."""
    return resolve_method(bool(recipe.get('coretune')), recipe.get('method'))


def _recipe(facts: CardFacts) -> Optional[str]:
    method = _method(facts.recipe)
    contrasts = method in METHODS and METHODS[method].contrasts
    recipe = {**facts.recipe, 'coretune': method == 'core', 'method': method != 'core' and method}
    used = {**recipe, 'contrasts': contrasts}
    keys = [key for needed, group in _RECIPE.items() if not needed or used.get(needed) for key in group]
    # an option that is 0, False or None was not used
    options = [(key, recipe[key]) for key in keys if recipe.get(key)]
    options = [(key, value) for key, value in options if value != _WITHOUT_EFFECT.get(key)]
    if not options:
        return None
    lines = ['## How it was trained', '', 'With `train.py -c args.yaml`. The main options are', '']
    lines += ['| option | value |', '|---|---|']
    lines += [
        f'| `--{key.replace("_", "-")}` | {"" if value is True else value} |' for key, value in options
    ]  # fmt: skip
    return '\n'.join(lines)
