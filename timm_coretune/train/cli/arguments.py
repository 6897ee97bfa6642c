"""The arguments of a run: flags over YAML over preset over the sample's recipe over defaults, and what contradicts"""

import argparse
import difflib
import importlib
import os
from importlib import resources
from typing import Any, Dict, List, NamedTuple, Optional

import timm
import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ...segmentation.data.transforms import INTERPOLATIONS
from .flags import PRESETS, create_parser


class ParsedArguments(NamedTuple):
    """The arguments of a run.

    Attributes:
        args: What argparse returned.
        text: The same as YAML, as written beside the weights.
        given: Names of those that were not left at their default.
        assumed: One sentence on what was not given and therefore assumed, or None.
    """

    args: argparse.Namespace
    text: str
    given: frozenset
    assumed: Optional[str] = None


def _assets():
    return resources.files('timm_coretune') / 'assets'


def _sample_recipe(name: str) -> Dict[str, Any]:
    """A recipe of the bundled sample, its paths made absolute."""
    recipe = yaml.safe_load((_assets() / name).read_text())
    for key in ('data_dir', 'pretrained_path'):
        recipe[key] = str(_assets() / recipe[key])
    return recipe


def _read_config(path: str, parser: argparse.ArgumentParser) -> Dict[str, Any]:
    try:
        with open(path) as f:
            config = yaml.safe_load(f) or {}
    except (OSError, yaml.YAMLError) as e:
        parser.error(f'argument -c/--config: cannot read {path!r}: {e}')
    known = {action.dest for action in parser._actions}
    unknown = sorted(set(config) - known)
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        parser.error(
            f'argument -c/--config: {path!r} has keys that are no options: {", ".join(unknown)}'
            + (f' (nearest: {near[0]})' if near else '')
        )
    return config


def _assume_sample(parser: argparse.ArgumentParser, named_model: Optional[str], segmentation: bool) -> str:
    """Make the sample and its recipe the defaults, and say so. What was given, a model above all, is left alone."""
    name, data = 'sample.yaml', 'the bundled Fashion-MNIST sample'
    if segmentation:
        name, data = 'sample_segmentation.yaml', 'scenes made of the bundled Fashion-MNIST sample'
    recipe = _sample_recipe(name)
    what = f'{data} with its recipe ({name})'
    if named_model is None:
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
    """Parse a command line and stop with a sentence where it contradicts itself."""
    parser = create_parser()
    # what was given explicitly: the same parser without defaults
    bare = create_parser()
    for action in bare._actions:
        action.default = argparse.SUPPRESS
    given = vars(bare.parse_args(argv))
    config = _read_config(given['config'], parser) if 'config' in given else {}
    given = {**config, **given}

    assumed = None
    if not any(given.get(key) for key in ('data', 'data_dir', 'dataset')):
        assumed = _assume_sample(parser, given.get('model'), given.get('segmentation', False))
    if given.keys() & {'preset', 'lr_base', 'lr_base_size', 'lr_base_scale'}:
        parser.set_defaults(lr=None)  # else the rate of the sample's recipe would win over them
    if given.get('preset'):
        if given['preset'] not in PRESETS:
            parser.error(f'argument --preset: {given["preset"]!r} in the config, choose from {", ".join(PRESETS)}')
        parser.set_defaults(**yaml.safe_load((_assets() / f'preset_{given["preset"]}.yaml').read_text()))
    if given.get('segmentation'):
        parser.set_defaults(eval_metric='miou')
    parser.set_defaults(**config)
    args = parser.parse_args(argv)
    args.data_dir = args.data_dir or args.data
    args.grad_accum_steps = max(1, args.grad_accum_steps)
    args.eval_only = args.eval_only or args.epochs == 0
    args.epochs = args.epochs or 1  # a schedule needs an epoch, which is not trained
    for problem in find_contradictions(args):
        parser.error(problem)
    text = yaml.safe_dump(vars(args), default_flow_style=False)
    return ParsedArguments(args, text, frozenset(given), assumed)


def split_names(names: str) -> List[str]:
    """The names of a comma-separated list."""
    return [name.strip() for name in names.split(',') if name.strip()]


def mixes_pixels(args: argparse.Namespace) -> bool:
    """Whether pixel mixup or CutMix is on, so that training targets are soft."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def _is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return '/' in name


def find_contradictions(args: argparse.Namespace) -> List[str]:
    """Sentences on arguments that exclude each other, or that nothing here can honour."""
    metrics = split_names(args.metrics)
    eval_metrics = ['loss', 'top1', 'top5', *(['ece'] if 'ece' in metrics else [])]
    eval_metrics += ['macro_f1'] if 'per-class' in metrics else []
    if args.segmentation:
        eval_metrics = ['loss', 'miou', 'pa', 'mpa', 'fwiou']
    sizes = args.train_img_sizes or []
    conditions = {
        '--torchscript: the Core-tuning step cannot be scripted; script the tuned model afterwards': (
            args.coretune and args.torchscript
        ),
        '--jsd-loss, --bce-loss: with --coretune the loss is its own; leave them out': (
            args.coretune and (args.jsd_loss or args.bce_loss)
        ),
        '--kd-model-name: distillation and --coretune are two tasks; choose one': args.coretune and args.kd_model_name,
        "--drop-connect: timm's own script reads it nowhere; use --drop-path": args.drop_connect is not None,
        '--local_rank: processes are started by accelerate launch --num_processes N train.py': (
            args.local_rank and 'LOCAL_RANK' not in os.environ
        ),
        '--device: cpu or cuda; accelerate launch --gpu_ids chooses among devices': (
            ':' in args.device or args.device not in ('cpu', 'cuda', 'mps', 'xpu', 'npu', 'hpu', 'mlu', 'musa', 'sdaa')
        ),
        '--amp needs --model-dtype float32, which it casts by itself': (
            args.amp and args.model_dtype not in (None, 'float32')
        ),
        '--torchscript: not with --torchcompile, --sync-bn, --freeze-epochs or --head-lr-scale': (
            args.torchscript
            and (args.torchcompile or args.sync_bn or args.freeze_epochs or args.head_lr_scale != 1)
        ),
        '--aug-splits: a split of 1 makes no sense; 2 or more, or 0 for none': args.aug_splits == 1,
        '--jsd-loss needs --aug-splits of 2 or more': args.jsd_loss and args.aug_splits < 2,
        '--split-bn needs --aug-splits of 2 or more, or --resplit': (
            args.split_bn and args.aug_splits < 2 and not args.resplit
        ),
        '--split-bn and --sync-bn exclude each other': args.split_bn and args.sync_bn,
        '--aug-splits: not with pixel mixup or --no-prefetcher': (
            args.aug_splits and (mixes_pixels(args) or args.no_prefetcher)
        ),
        '--naflex-loader and --train-img-sizes are alternatives': args.naflex_loader and sizes,
        '--naflex-loader: not with --use-multi-epochs-loader, --aug-splits, --aug-repeats or --class-balance': (
            args.naflex_loader
            and (args.use_multi_epochs_loader or args.aug_splits or args.aug_repeats or args.class_balance)
        ),
        '--naflex-patch-size-probs must be as many as --naflex-patch-sizes': (
            args.naflex_patch_size_probs
            and len(args.naflex_patch_size_probs) != len(args.naflex_patch_sizes or [])
        ),
        '--train-batch-sizes and --train-size-probs must be as many as --train-img-sizes': any(
            values and len(values) != len(sizes) for values in (args.train_batch_sizes, args.train_size_probs)
        ),
        '--train-img-sizes: not with --use-multi-epochs-loader, --aug-splits or --class-balance': (
            sizes and (args.use_multi_epochs_loader or args.aug_splits or args.class_balance)
        ),
        '--class-balance and --aug-repeats both order the images; choose one': args.class_balance and args.aug_repeats,
        '--class-balance needs a --batch-size of 4 or more': args.class_balance and args.batch_size < 4,
        '--segmentation: not with --mixup, --cutmix, --cutmix-minmax, --aug-splits, --aug-repeats, --epoch-repeats, '
        '--class-balance, --naflex-loader, --train-img-sizes, --use-multi-epochs-loader or --tta': (
            args.segmentation
            and (
                any((mixes_pixels(args), args.aug_splits, args.aug_repeats, args.epoch_repeats, args.class_balance))
                or any((args.naflex_loader, sizes, args.use_multi_epochs_loader, args.tta))
            )
        ),
        '--segmentation: --aa, --reprob, --grayscale-prob, --gaussian-blur-prob and --color-jitter-prob know no masks; '
        'there are --scale, --ratio, --hflip, --vflip and --color-jitter': (
            args.segmentation
            and any(
                (args.aa, args.reprob, args.grayscale_prob, args.gaussian_blur_prob, args.color_jitter_prob is not None)
            )
        ),
        '--segmentation: not with --jsd-loss, --bce-loss, --kd-model-name, --torchscript or --split-bn': (
            args.segmentation
            and any((args.jsd_loss, args.bce_loss, args.kd_model_name, args.torchscript, args.split_bn))
        ),
        '--segmentation: no part in it have --gp, --drop, --head-init-scale, --head-init-bias, --crop-pct, '
        '--train-crop-mode, --train-num-samples, --val-num-samples and --dataset-trust-remote-code': (
            args.segmentation
            and (
                any(value is not None for value in (args.gp, args.head_init_scale, args.head_init_bias, args.crop_pct))
                or any(v is not None for v in (args.train_crop_mode, args.train_num_samples, args.val_num_samples))
                or any((args.drop, args.dataset_trust_remote_code))
            )
        ),
        f'--segmentation: --interpolation and --train-interpolation are among {", ".join(INTERPOLATIONS)}': (
            args.segmentation
            and (
                args.interpolation not in ('', *INTERPOLATIONS)
                or args.train_interpolation not in ('', 'random', *INTERPOLATIONS)
            )
        ),
        '--segmentation: --metrics are those of images; the scores of pixels are always there': (
            args.segmentation and metrics
        ),
        '--segmentation-head and --reduce-zero-label need --segmentation': (
            not args.segmentation and (args.segmentation_head or args.reduce_zero_label)
        ),
        '--anchors-per-image: 1 or more': args.anchors_per_image < 1,
        '--wandb-resume-id needs --resume': args.wandb_resume_id and not args.resume,
        '--label-fraction: above 0, at most 1': not 0 < args.label_fraction <= 1,
        '--head-lr-scale: above 0': args.head_lr_scale <= 0,
        '--freeze-epochs: 0 or more': args.freeze_epochs < 0,
        '--patience: 1 or more': args.patience is not None and args.patience < 1,
        '--eval-only needs a --val-split': args.eval_only and not args.val_split,
        '--metrics: choose from confusion, per-class, ece': set(metrics) - {'confusion', 'per-class', 'ece'},
        f'--eval-metric: choose from {", ".join(eval_metrics)}': args.eval_metric not in eval_metrics,
        '--push-to-hub: OWNER/NAME, of letters, digits, -, _ and .': (
            args.push_to_hub is not None and not _is_repo_id(args.push_to_hub)
        ),
        '--push-to-hub pushes what was trained: not with --eval-only or --epochs 0': (
            args.push_to_hub is not None and args.eval_only
        ),
        '--hub-private and --hub-revision need --push-to-hub': (
            args.push_to_hub is None and (args.hub_private or args.hub_revision is not None)
        ),
        '--resume auto needs --experiment NAME, the folder to look into': (
            args.resume == 'auto' and not args.experiment
        ),
    }  # fmt: skip
    return [sentence for sentence, holds in conditions.items() if holds]


def import_device_modules(args: argparse.Namespace) -> None:
    """Import the Python modules that bring further kinds of devices."""
    for name in args.device_modules or ():
        importlib.import_module(name)
