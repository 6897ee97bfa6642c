"""Parses a command line. Flags win over the YAML file, then come the preset, the sample's recipe and defaults"""

import argparse
import dataclasses
import os
import sys
from importlib import resources
from typing import Any, Dict, List, NamedTuple, Optional

import timm
import yaml

from ...model_config import PREPROCESSING, Description, check_model
from ...redaction import REDACTED, expand_home, map_texts, redact_values, remember
from ...run_folder import describe_weights, find_weights
from .config_file import read_config
from .conflicts import find_contradictions
from .flags import Parser, add_flags
from .ranges import find_out_of_range
from .settings import TUNING, Settings

PRESETS = ('cnn', 'vit')
# Settings that belong to one start of a run and are not repeated with it: where it is published, what it continues,
# whether it has a report, and other names of settings
_OF_ONE_START = (
    *('push_to_hub', 'hub_private', 'hub_revision', 'resume', 'no_resume_opt', 'wandb_resume_id'),
    *('config', 'data', 'local_rank', 'report'),
)
# settings that may be URLs: a file that was downloaded is found again without the secrets of its URL
_CHECKPOINTS = ('pretrained_path', 'initial_checkpoint')
# arguments of a timm model that have a flag of their own
_FLAG_OF = {'in_chans': 'in_chans', 'global_pool': 'gp', 'bn_eps': 'bn_eps', 'bn_momentum': 'bn_momentum'}


class ParsedArguments(NamedTuple):
    """Result of parsing a command line.

    Attributes:
        settings: The settings of the run.
        text: The settings as YAML for --config, to be written into the run folder. They repeat the run, so where to
            publish, what to resume, and a device that was not asked for are left out.
        given: Names of the settings that were given by flags or in the YAML file.
        assumed: Message about data that was assumed because none was given, or None.
    """

    settings: Settings
    text: str
    given: frozenset
    assumed: Optional[str] = None


def create_parser() -> Parser:
    """Create the parser of train.py: a flag for every setting, and flags that read settings from files."""
    parser = Parser(
        prog='train.py',
        description='Fine-tune a pretrained timm model on labelled images or masks, with --coretune by Core-tuning.',
        epilog='Without --data-dir and --dataset a bundled sample of Fashion-MNIST is used.',
    )
    add = parser.add_argument_group('where settings come from').add_argument
    add('data', nargs='?', metavar='DIR', help='data set (deprecated, use --data-dir)')
    add('-c', '--config', default='', metavar='FILE', help='YAML file of settings; flags win over it')
    parser.add_argument_group(TUNING).add_argument(
        '--preset',
        choices=PRESETS,
        help='defaults for tuning a CNN or a ViT (docs/flags.md); flags win over them',
    )
    add_flags(parser, [type(getattr(Settings(), group.name)) for group in dataclasses.fields(Settings)])
    return parser


def _assets() -> Any:
    return resources.files('timm_coretune') / 'assets'


def _sample_recipe(name: str) -> Dict[str, Any]:
    """A recipe of the bundled sample, with absolute paths."""
    recipe = yaml.safe_load((_assets() / name).read_text())
    for key in ('data_dir', 'pretrained_path'):
        recipe[key] = str(_assets() / recipe[key])
    return recipe


def _preset(name: str) -> Dict[str, Any]:
    return yaml.safe_load((_assets() / f'preset_{name}.yaml').read_text())


def _shortened_warmup(preset: str, epochs: int) -> int:
    """Warm-up of a preset in a run of this many epochs: the same share, but whole epochs and no more than half."""
    values = _preset(preset)
    return min(-(-values['warmup_epochs'] * epochs // values['epochs']), epochs // 2)


def _leave_out_one_start(config: Dict[str, Any]) -> List[str]:
    """Take out what an args.yaml of an earlier version has beyond the settings that repeat a run. Returns the names."""
    if 'config' not in config:  # only a saved file names the file that it was itself read from
        return []
    left_out = [name for name in (*_OF_ONE_START, 'device') if config.pop(name, None)]
    return [name for name in left_out if name not in ('config', 'data')]


def _to_yaml(args: argparse.Namespace, given: frozenset) -> str:
    """The settings for --config: those that were given, then those that follow from presets, recipes and defaults."""
    left_out = {*_OF_ONE_START, *(() if 'device' in given else ('device',)), *(('start_epoch',) if args.resume else ())}
    if args.global_batch_size is not None:
        left_out.add('batch_size')  # depends on the number of processes
    asked = given | ({'data_dir'} if 'data' in given else set())
    text = '# train.py -c FILE repeats the run with the settings in this file.\n'
    settings = redact_values(vars(args))
    for title, is_asked in (('given', True), ('defaults, or from a preset or recipe', False)):
        values = {k: v for k, v in settings.items() if k not in left_out and (k in asked) is is_asked}
        if values:
            text += f'# {title}:\n{yaml.safe_dump(values, default_flow_style=False)}'
    return text


def _check_redacted(given: Dict[str, Any], parser: argparse.ArgumentParser) -> None:
    """Refuse settings of which a secret was left out when they were written, but for checkpoints."""
    names = [name for name, value in given.items() if REDACTED in str(value) and name not in _CHECKPOINTS]
    if names:
        flags = ', '.join(f'--{name.replace("_", "-")}' for name in names)
        parser.error(f'argument {flags}: secrets were left out ({REDACTED}) when this was written; give them again')


class _Weights(NamedTuple):
    """Weights that the command line names, and what the config beside them says.

    Attributes:
        path: File of the weights.
        description: Content of the config.
    """

    path: str
    description: Description


def _find_weights(given: Dict[str, Any], parser: argparse.ArgumentParser) -> Optional[_Weights]:
    """Find the weights of --model FOLDER, or of an --initial-checkpoint that has the model of --model or is alone.

    Returns None if there are no such weights, or no config beside them.
    """
    model, checkpoint = str(given.get('model') or ''), str(given.get('initial_checkpoint') or '')
    is_folder = os.path.isdir(model) and not timm.is_model(model)
    try:
        description = describe_weights(model if is_folder else checkpoint)
    except ValueError as e:
        parser.error(f'argument {"--model" if is_folder else "--initial-checkpoint"}: {e}')
    if is_folder:
        path = checkpoint or (find_weights(model, description) if description else None)
        if description is None or not path:
            missing = 'weights' if description else 'config.json or segmentation.json of a timm model'
            parser.error(
                f'argument --model: expected a timm model or the folder of a run, found no {missing} in {model!r}. '
                'A run writes its weights when its first epoch is over.'
            )
        if given.get('segmentation') and description.segmentation_head is None:
            parser.error(
                f'argument --model: {model!r} is the run of a classifier. Start a segmentation from it with --model '
                f'{description.architecture} --pretrained-path {path}'
            )
        if given.get('pretrained') or given.get('pretrained_path'):
            parser.error('argument --model: a folder brings its weights; not with --pretrained or --pretrained-path')
        return _checked(path, description, parser)
    named = timm.models.split_model_name_tag(model)[0]
    if description is None or named not in ('', description.architecture):
        return None
    if named and bool(given.get('segmentation')) != (description.segmentation_head is not None):
        return None  # the backbone of another kind of model
    return _checked(checkpoint, description, parser)


def _checked(path: str, description: Description, parser: argparse.ArgumentParser) -> _Weights:
    """Refuse a config from which timm would load more than these weights: the model is built as it says."""
    try:
        check_model(description.architecture, description.model_args, description.path)
    except ValueError as e:
        parser.error(f'the config beside {path!r}: {e}')
    return _Weights(path, description)


def _follow_weights(args: argparse.Namespace, weights: _Weights, given: Dict[str, Any]) -> None:
    """Take model, arguments and task from the config beside weights, except for what was given."""
    description = weights.description
    args.initial_checkpoint = weights.path
    if 'model' not in given or not timm.is_model(args.model):
        args.model = description.architecture
    model_args = dict(description.model_args)
    for key, flag in _FLAG_OF.items():
        value = model_args.pop(key, None)
        if value is None or flag in given:
            continue
        if (key == 'in_chans' and 'input_size' in given) or (key == 'global_pool' and args.segmentation):
            continue
        setattr(args, flag, value)
    size = given['input_size'][1:] if given.get('input_size') else given.get('img_size')
    if 'img_size' in model_args and size:
        model_args['img_size'] = size  # the model is built for one size
    args.model_kwargs = {**model_args, **args.model_kwargs}
    if description.segmentation_head is not None and 'segmentation_head' not in given:
        args.segmentation_head = description.segmentation_head


def _assume_sample(
    parser: argparse.ArgumentParser, named_model: Optional[str], segmentation: bool, weights: Optional[_Weights]
) -> str:
    """Make the bundled sample and its recipe the defaults, except for a model that was named. Returns a message."""
    name, data = 'sample.yaml', 'the bundled Fashion-MNIST sample'
    if segmentation:
        name, data = 'sample_segmentation.yaml', 'scenes made of the bundled Fashion-MNIST sample'
    recipe = _sample_recipe(name)
    what = f'{data} with its recipe ({name})'
    if weights is not None:  # their config says how images are prepared
        excluded = ('model', 'pretrained_path', 'model_kwargs', 'img_size', *PREPROCESSING)
        recipe = {k: v for k, v in recipe.items() if k not in excluded}
    elif named_model is None:
        what += f' and its contrastive checkpoint ({os.path.basename(recipe["pretrained_path"])})'
    else:
        recipe = {k: v for k, v in recipe.items() if k not in ('model', 'pretrained_path', 'model_kwargs')}
        if timm.is_model(named_model) and timm.models.get_pretrained_cfg_value(named_model, 'fixed_input_size'):
            del recipe['img_size']
    parser.set_defaults(**recipe)
    return (
        f'No --data-dir or --dataset given: using {what}. '
        'Name your own with --data-dir DIR --model NAME --pretrained-path FILE.'
    )


def parse_args(argv: Optional[List[str]] = None) -> ParsedArguments:
    """Parse a command line. Exits with an error message if settings contradict each other."""
    parser = create_parser()
    # a parser without defaults tells what was given explicitly
    bare = create_parser()
    for action in bare._actions:
        action.default = argparse.SUPPRESS
    argv = map_texts(sys.argv[1:] if argv is None else list(argv), expand_home)
    given = vars(bare.parse_args(argv))
    config = read_config(given['config'], parser) if 'config' in given else {}
    left_out = _leave_out_one_start(config)
    given = {**config, **given}
    _check_redacted(given, parser)
    if given.get('global_batch_size') is not None and given.get('batch_size') is not None:
        parser.error(
            'argument --global-batch-size: it is shared out to the processes, so --batch-size follows from it; give one'
        )
    remember(given)
    weights = _find_weights(given, parser)
    if weights is not None and weights.description.segmentation_head is not None:
        given.setdefault('segmentation', True)
        parser.set_defaults(segmentation=True)

    assumed = None
    if not any(given.get(key) for key in ('data', 'data_dir', 'dataset')):
        assumed = _assume_sample(parser, given.get('model'), given.get('segmentation', False), weights)
    if given.keys() & {'preset', 'lr_base', 'lr_base_size', 'lr_base_scale'}:
        parser.set_defaults(lr=None)  # otherwise the lr of the sample's recipe would win over them
    if given.get('preset'):
        parser.set_defaults(**_preset(given['preset']))
    if given.get('segmentation'):
        parser.set_defaults(eval_metric='miou')
    if given.get('task') == 'multilabel':
        parser.set_defaults(eval_metric='map', smoothing=0.0)  # as timm's script
    parser.set_defaults(**config)
    args = parser.parse_args(argv)
    for problem in find_out_of_range(Settings.from_flat(vars(args))):
        parser.error(problem)
    if args.preset and 'warmup_epochs' not in given:
        args.warmup_epochs = _shortened_warmup(args.preset, args.epochs)
    if weights is not None:
        _follow_weights(args, weights, given)
    args.data_dir = args.data_dir or args.data
    args.grad_accum_steps = max(1, args.grad_accum_steps)
    args.eval_only = args.eval_only or args.epochs == 0
    args.epochs = args.epochs or 1  # a schedule needs an epoch, though none is trained
    settings = Settings.from_flat(vars(args))
    vars(args).update(dataclasses.asdict(settings.loss.with_defaults(settings.data.segmentation)))
    settings = Settings.from_flat(vars(args))
    for problem in find_contradictions(settings):
        parser.error(problem)
    text = _to_yaml(args, frozenset(given))
    if left_out:
        note = f'The --config is of an earlier version and not repeated in full: {", ".join(left_out)} left out.'
        assumed = f'{assumed} {note}' if assumed else note
    return ParsedArguments(settings, text, frozenset(given), assumed)
