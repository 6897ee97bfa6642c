"""Finds settings that exclude each other or are not supported, with a function for each group of flags"""

import os
from importlib import resources
from typing import Any, Dict, List, Optional

from huggingface_hub.utils import HFValidationError, validate_repo_id

from ...data.columns import is_table
from ...data.resampling import INTERPOLATIONS as INTERPOLATIONS_ON_DEVICE
from ...evaluation.scores import FURTHER_OF_IMAGES, FURTHER_OF_LABEL_SETS, OF_LABEL_SETS, OF_PIXELS, scores_of_images
from ...loss import METHODS
from ...segmentation.data.transforms import INTERPOLATIONS
from .criterion import find_obstacle, label_loss, needs_stats
from .settings import DataSettings, LossSettings, Settings

Conditions = Dict[str, Any]  # error message -> a value that is true if the error is present
_DEVICES = ('cpu', 'cuda', 'mps', 'xpu', 'npu', 'hpu', 'mlu', 'musa', 'sdaa')


def split_names(names: str) -> List[str]:
    """The names of a comma-separated list."""
    return [name.strip() for name in names.split(',') if name.strip()]


def find_contradictions(settings: Settings) -> List[str]:
    """Error messages about settings that exclude each other. Each begins with the flags that it is about."""
    of_images = (_of_losses, _of_models, _of_augmentation, _of_batches)
    groups = (*of_images, _of_segmentation, _of_several_labels, _of_the_loop, _of_outputs)
    found = [sentence for group in groups for sentence, holds in group(settings).items() if holds]
    obstacle = '' if found else find_obstacle(settings)
    return [*found, obstacle] if obstacle else found


def _of_losses(settings: Settings) -> Conditions:
    loss, data, defaults = settings.loss, settings.data, LossSettings()
    names, weights = loss.label_losses, (loss.loss_class_weight, loss.pos_weight)
    method = METHODS[loss.task_loss] if loss.task_loss and not data.is_multi_label else None
    has_cross_entropy = method is not None and label_loss(loss, multi_label=False) == 'ce'
    return {
        '--loss, --bce-loss and --jsd-loss each name the loss on the labels; choose one': len(names) > 1,
        '--bce-pos-weight is --loss-pos-weight; give one of them': (
            loss.bce_pos_weight is not None and loss.loss_pos_weight is not None
        ),
        '--loss asl: with --coretune or a --method a row may have shares of several classes, and asl takes class '
        'indices, unless images have several labels; choose ce, bce or poly': bool(method) and 'asl' in names,
        '--loss jsd and --jsd-loss compare augmentation splits of the same images, which --coretune and a --method '
        'would take for positives; choose ce, bce or poly': bool(loss.task_loss) and 'jsd' in names,
        '--loss: this --method takes the cross-entropy of rows that it remembers too; leave it out': (
            method is not None and not method.takes_classification_loss and not has_cross_entropy
        ),
        '--bce-sum and --bce-target-thresh need --loss bce': has_cross_entropy
        and (loss.bce_sum or loss.bce_target_thresh is not None),
        '--loss-pos-weight: cross-entropy has no positives and negatives; use --loss-class-weight, or --loss bce': (
            has_cross_entropy and loss.pos_weight is not None
        ),
        '--loss coretune is --coretune: not with another --method': (
            loss.loss == 'coretune' and loss.method not in (None, 'core')
        ),
        '--poly-epsilon and --poly-gamma need --loss poly': 'poly' not in names
        and ((loss.poly_epsilon, loss.poly_gamma) != (defaults.poly_epsilon, defaults.poly_gamma)),
        '--loss-weight-power needs --loss-class-weight inv_freq or --loss-pos-weight neg_pos': (
            loss.loss_weight_power != defaults.loss_weight_power and not {'inv_freq', 'neg_pos'} & set(weights)
        ),
        '--class-stats is read for --loss db and for weights by a method, such as --loss-class-weight inv_freq': (
            loss.class_stats is not None and not needs_stats(loss)
        ),
        '--kd-model-name: distillation and --coretune or a --method are two tasks; choose one': (
            loss.task_loss and loss.kd_model_name
        ),
        '--coretune is --method core: not with another method': loss.coretune and loss.method not in (None, 'core'),
        '--method-kwargs needs a --method other than plain': loss.method_kwargs and not loss.task_loss,
        '--segmentation: this --method compares whole images; choose one that docs/methods.md marks for pixels': (
            data.segmentation and loss.task_loss and not METHODS[loss.task_loss].for_pixels
        ),
        '--jsd-loss needs --aug-splits of 2 or more': 'jsd' in names and data.aug_splits < 2,
        '--coretune-smooth-weight: not with --coretune-smooth none, which learns no mixtures': (
            loss.coretune_smooth_weight is not None and loss.coretune_smooth == 'none'
        ),
    }


def _of_models(settings: Settings) -> Conditions:
    model, optimization = settings.model, settings.optimization
    return {
        '--torchscript: the step of a --method cannot be scripted; script the tuned model afterwards': (
            settings.loss.task_loss and model.torchscript
        ),
        '--torchscript: not with --torchcompile, --sync-bn, --freeze-epochs or --head-lr-scale': (
            model.torchscript
            and (
                model.torchcompile
                or model.sync_bn
                or optimization.freeze_epochs
                or optimization.head_lr_scale != 1
            )
        ),
        '--lora-alpha needs --lora-rank': model.lora_alpha is not None and model.lora_rank is None,
        '--lora-rank: not with --torchscript or --split-bn': (
            model.lora_rank is not None and (model.torchscript or model.split_bn)
        ),
        '--lora-rank: --method l2-sp and spd hold weights near those that were pretrained, and with LoRA these do not '
        'change; leave one of them out': model.lora_rank is not None and settings.loss.task_loss in ('l2-sp', 'spd'),
        "--drop-connect: timm's own script reads it nowhere; use --drop-path": model.drop_connect is not None,
        '--split-bn needs --aug-splits of 2 or more, or --resplit': (
            model.split_bn and settings.data.aug_splits < 2 and not settings.data.resplit
        ),
        '--split-bn and --sync-bn exclude each other': model.split_bn and model.sync_bn,
        '--amp needs --model-dtype float32, which it casts by itself': (
            settings.loop.amp and model.model_dtype not in (None, 'float32')
        ),
        '--model-ema-publish ema needs --model-ema; that of --model-ema-force-cpu is not validated': (
            model.model_ema_publish == 'ema' and (not model.model_ema or model.model_ema_force_cpu)
        ),
        '--checkpoint-frames: 1 or more, of a --pretrained-path': (
            model.checkpoint_frames is not None and not model.pretrained_path
        ),
    }  # fmt: skip


def _of_augmentation(settings: Settings) -> Conditions:
    data = settings.data
    return {
        '--aug-splits: a split of 1 makes no sense; 2 or more, or 0 for none': data.aug_splits == 1,
        '--aug-splits: not with pixel mixup or --no-prefetcher': (
            data.aug_splits and (data.mixes_pixels or data.no_prefetcher)
        ),
        '--gpu-augment-size needs --gpu-augment': data.gpu_augment_size is not None and not data.gpu_augment,
        '--gpu-augment: the policies of --aa and --aug-splits choose other operations for each image, which a batch '
        'on a device cannot; leave them out, or --gpu-augment': (data.gpu_augment and (data.aa or data.aug_splits)),
        '--gpu-augment takes random resized crops; not with --no-aug or another --train-crop-mode': (
            data.gpu_augment and (data.no_aug or data.train_crop_mode not in (None, 'rrc'))
        ),
        '--gpu-augment: --train-interpolation is bilinear, bicubic or random': (
            data.gpu_augment and data.train_interpolation not in ('', *INTERPOLATIONS_ON_DEVICE)
        ),
        '--gpu-augment makes batches of one size in the prefetching loader; not with --no-prefetcher, '
        '--train-img-sizes or --naflex-loader': (
            data.gpu_augment and (data.no_prefetcher or data.train_img_sizes or data.naflex_loader)
        ),
        '--gpu-augment knows no masks; not with --segmentation': data.gpu_augment and data.segmentation,
    }


def _of_batches(settings: Settings) -> Conditions:
    data, method = settings.data, settings.loss.task_loss
    sizes = data.train_img_sizes or []
    contrasting = ', '.join(name for name, loss in METHODS.items() if loss.contrasts)
    mixed = [] if settings.loop.eval_only or data.naflex_loader or not data.mixes_pixels else data.batch_sizes
    per_size = (data.train_batch_sizes, data.train_size_probs)
    return {
        '--naflex-loader and --train-img-sizes are alternatives': data.naflex_loader and sizes,
        '--naflex-loader: not with --use-multi-epochs-loader, --aug-splits, --aug-repeats or --class-balance': (
            data.naflex_loader
            and (data.use_multi_epochs_loader or data.aug_splits or data.aug_repeats or data.class_balance)
        ),
        '--naflex-patch-size-probs must be as many as --naflex-patch-sizes': (
            data.naflex_patch_size_probs
            and len(data.naflex_patch_size_probs) != len(data.naflex_patch_sizes or [])
        ),
        '--train-batch-sizes and --train-size-probs must be as many as --train-img-sizes': any(
            values and len(values) != len(sizes) for values in per_size
        ),
        '--train-img-sizes: not with --use-multi-epochs-loader, --aug-splits or --class-balance': (
            sizes and (data.use_multi_epochs_loader or data.aug_splits or data.class_balance)
        ),
        '--class-balance and --aug-repeats both order the images; choose one': data.class_balance and data.aug_repeats,
        '--global-batch-size: one size for all batches; not with --train-img-sizes or --naflex-loader': (
            data.global_batch_size is not None and (sizes or data.naflex_loader)
        ),
        '--contrast-batch-size: not with --segmentation, --naflex-loader or --train-img-sizes': (
            data.contrast_batch_size is not None and (data.segmentation or data.naflex_loader or sizes)
        ),
        f'--contrast-batch-size: with --coretune or a --method that compares the images of a batch ({contrasting}); '
        'others have --grad-accum-steps': (
            data.contrast_batch_size is not None and not (method and METHODS[method].contrasts)
        ),
        '--contrast-batch-size: a multiple of the --batch-size, or of the --global-batch-size if that is given': (
            data.contrast_batch_size is not None
            and data.contrast_batch_size % (data.global_batch_size or data.batch_size)
        ),
        '--class-balance needs a --batch-size of 4 or more': data.class_balance and data.batch_size < 4,
        '--mixup, --cutmix and --cutmix-minmax mix pairs of images: the --batch-size, or each of --train-batch-sizes, '
        'must be even': any(size % 2 for size in mixed),
        '--val-fraction: above 0 and below 1, or with --eval-only 1 for all images': (
            data.val_fraction is not None
            and not 0 < data.val_fraction < 1
            and not (data.val_fraction == 1 and settings.loop.eval_only)
        ),
        '--val-fraction holds out training images: not with a --val-split or --segmentation': (
            data.val_fraction is not None
            and (data.segmentation or data.val_split != DataSettings().val_split)
        ),
    }  # fmt: skip


def _of_segmentation(settings: Settings) -> Conditions:
    data, model, loss = settings.data, settings.model, settings.loss
    refused: Conditions = {
        '--segmentation: not with --mixup, --cutmix, --cutmix-minmax, --aug-splits, --aug-repeats, --epoch-repeats, '
        '--class-balance, --naflex-loader, --train-img-sizes, --use-multi-epochs-loader or --tta': (
            any((data.mixes_pixels, data.aug_splits, data.aug_repeats, data.epoch_repeats, data.class_balance))
            or any((data.naflex_loader, data.train_img_sizes, data.use_multi_epochs_loader, settings.loop.tta))
        ),
        '--segmentation: --aa, --reprob, --grayscale-prob, --gaussian-blur-prob and --color-jitter-prob know no masks; '
        'there are --scale, --ratio, --hflip, --vflip and --color-jitter': (
            any((data.aa, data.reprob, data.grayscale_prob, data.gaussian_blur_prob))
            or data.color_jitter_prob is not None
        ),
        '--segmentation: not with --jsd-loss, --bce-loss, --loss, --loss-pos-weight, --kd-model-name, --torchscript or '
        '--split-bn': (
            any(name != 'ce' for name in loss.label_losses)
            or any((loss.pos_weight, loss.kd_model_name, model.torchscript, model.split_bn))
        ),
        '--segmentation: pixels are not counted; a --loss-class-weight by a method needs --class-stats FILE': (
            needs_stats(loss) and loss.class_stats is None
        ),
        '--segmentation: no part in it have --gp, --drop, --head-init-scale, --head-init-bias, --crop-pct, '
        '--train-crop-mode, --train-num-samples, --val-num-samples and --dataset-trust-remote-code': (
            any(v is not None for v in (model.gp, model.head_init_scale, model.head_init_bias, data.crop_pct))
            or any(v is not None for v in (data.train_crop_mode, data.train_num_samples, data.val_num_samples))
            or any((model.drop, data.dataset_trust_remote_code))
        ),
        f'--segmentation: --interpolation and --train-interpolation are among {", ".join(INTERPOLATIONS)}': (
            data.interpolation not in ('', *INTERPOLATIONS)
            or data.train_interpolation not in ('', 'random', *INTERPOLATIONS)
        ),
        '--segmentation: a table has labels of whole images; --data-dir is a folder of images and masks': (
            data.data_dir is not None and is_table(data.data_dir)
        ),
        '--segmentation: an image that cannot be read is always an error; not with --skip-unreadable or '
        '--check-images': data.skip_unreadable or data.check_images != 'files',
        '--segmentation: --metrics are those of images; the scores of pixels are always there': (
            split_names(settings.loop.metrics)
        ),
    }
    return {
        **{sentence: data.segmentation and holds for sentence, holds in refused.items()},
        '--segmentation-head, --reduce-zero-label, --mask-colors and --remap-masks need --segmentation': (
            not data.segmentation
            and (model.segmentation_head or data.reduce_zero_label or data.mask_colors or data.remap_masks)
        ),
        '--ignore-index needs --segmentation': not data.segmentation and data.ignore_index != 255,
        '--ignore-index: --mask-colors FILE ignores the colours named ignore, and --reduce-zero-label 0; choose one': (
            data.ignore_index != 255
            and (data.mask_colors not in ('', 'index') or (data.ignore_index == 0 and data.reduce_zero_label))
        ),
        '--mask-colors FILE: the file says which colour is which class, and which to ignore; not with --remap-masks, '
        '--reduce-zero-label or --class-map': (
            data.mask_colors not in ('', 'index') and (data.remap_masks or data.reduce_zero_label or data.class_map)
        ),
    }


def _of_several_labels(settings: Settings) -> Conditions:
    data, loss = settings.data, settings.loss
    refused: Conditions = {
        '--task multilabel: not with --segmentation, --class-balance, --jsd-loss or --kd-model-name': (
            any((data.segmentation, data.class_balance, loss.jsd_loss, loss.kd_model_name))
        ),
        '--loss twoway and --loss zlpr take no soft targets, which mixtures have; --coretune-smooth none '
        'learns none': loss.task_loss == 'core' and loss.coretune_smooth != 'none' and {'twoway', 'zlpr'} & {loss.loss},
        f'--task multilabel: --method {loss.method} compares images by their one class; choose one that '
        'docs/multilabel.md lists': loss.task_loss and not METHODS[loss.task_loss].for_multi_label,
        '--task multilabel needs --data-dir or --dataset: the images of the bundled sample have one label each': (
            not data.dataset and _is_sample(data.data_dir)
        ),
    }
    several = data.target_key is not None and ',' in data.target_key
    return {
        **{sentence: data.is_multi_label and holds for sentence, holds in refused.items()},
        '--target-format multihot and --target-key with several fields need --task multilabel': (
            not data.is_multi_label and (data.target_format == 'multihot' or several)
        ),
        '--target-key with several fields has a class for each; not with --target-format multihot': (
            several and data.target_format == 'multihot'
        ),
    }


def _is_sample(data_dir: Optional[str]) -> bool:
    assets = str(resources.files('timm_coretune') / 'assets')
    return not data_dir or os.path.dirname(os.path.abspath(data_dir)) == assets


def _of_the_loop(settings: Settings) -> Conditions:
    loop, data = settings.loop, settings.data
    metrics = split_names(loop.metrics)
    scores = OF_PIXELS if settings.data.segmentation else scores_of_images(metrics)
    scores = OF_LABEL_SETS if settings.data.is_multi_label else scores
    known = FURTHER_OF_LABEL_SETS if settings.data.is_multi_label else tuple(FURTHER_OF_IMAGES)
    return {
        '--local_rank: processes are started by accelerate launch --num_processes N train.py': (
            loop.local_rank and 'LOCAL_RANK' not in os.environ
        ),
        '--device: cpu or cuda; accelerate launch --gpu_ids chooses among devices': loop.device not in _DEVICES,
        '--skip-unreadable needs a --val-split': settings.data.skip_unreadable and not settings.data.val_split,
        '--eval-only needs a --val-split': loop.eval_only and not settings.data.val_split,
        '--eval-output is for --eval-only; a run that trains writes to --output': (
            loop.eval_output is not None and not loop.eval_only
        ),
        '--watch-features measures what training changes, in classification; not with --eval-only, --segmentation, '
        '--task multilabel or --torchscript': loop.watch_features
        and any((loop.eval_only, data.segmentation, data.is_multi_label, settings.model.torchscript)),
        '--watch-features needs a --val-split, whose images are not trained on': (
            loop.watch_features and not data.val_split
        ),
        '--watch-features: measures weights that are validated; choose a multiple of --val-interval': (
            loop.watch_features % loop.val_interval
        ),
        f'--metrics: choose from {", ".join(known)}': set(metrics) - set(known),
        f'--eval-metric: choose from {", ".join(scores)}': loop.eval_metric not in scores,
    }


def _of_outputs(settings: Settings) -> Conditions:
    output = settings.output
    return {
        '--wandb-resume-id needs --resume': output.wandb_resume_id and not output.resume,
        '--push-to-hub: OWNER/NAME, of letters, digits, -, _ and .': (
            output.push_to_hub is not None and not _is_repo_id(output.push_to_hub)
        ),
        '--push-to-hub pushes what was trained: not with --eval-only or --epochs 0': (
            output.push_to_hub is not None and settings.loop.eval_only
        ),
        '--report is of a run that trains: not with --eval-only or --epochs 0': (
            output.report and settings.loop.eval_only
        ),
        '--hub-private and --hub-revision need --push-to-hub': (
            output.push_to_hub is None and (output.hub_private or output.hub_revision is not None)
        ),
        '--resume auto needs --experiment NAME, the folder to look into': (
            output.resume == 'auto' and not output.experiment
        ),
    }


def _is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return '/' in name
