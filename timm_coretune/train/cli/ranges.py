"""The range of every number on the command line, checked before anything is opened

A range holds what timm's script can work with, not what is wise: 0 stands for `none` where it does so in timm.
"""

import dataclasses
import math
from typing import Dict, List, NamedTuple, Optional

from .flags import numbers_of
from .settings import Settings


class Range(NamedTuple):
    """The values that a flag takes.

    Attributes:
        low: Smallest value.
        high: Greatest value.
        above: Whether low itself is left out.
        below: Whether high itself is left out.
        num_values: Number of values, of a flag that takes several. None for any number.
        may_be_infinite: Whether infinity is a value.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    num_values: Optional[int] = None
    may_be_infinite: bool = False

    def has(self, value: float) -> bool:
        """Whether a value is in the range. NaN is in none."""
        if math.isinf(value) and not self.may_be_infinite:
            return False
        is_above = value > self.low if self.above else value >= self.low
        is_below = value < self.high if self.below else value <= self.high
        return is_above and is_below

    def __str__(self) -> str:
        if self.low == -math.inf:
            text = 'a finite number'
        elif self.high == math.inf:
            text = f'above {self.low:g}' if self.above else f'{self.low:g} or more'
        elif self.above or self.below:
            first = f'above {self.low:g}' if self.above else f'{self.low:g} or more'
            text = f'{first}, {"below" if self.below else "at most"} {self.high:g}'
        else:
            text = f'{self.low:.12g} to {self.high:.12g}'
        return f'{self.num_values} values, each {text}' if self.num_values else text


_ANY = Range()
_AT_LEAST_0 = Range(0)
_AT_LEAST_1 = Range(1)
_ABOVE_0 = Range(0, above=True)
_SHARE = Range(0, 1)
_BELOW_1 = Range(0, 1, below=True)
_CONFLICTS = _ANY  # conflicts.py knows more about these


def _all(kind: Range, names: str) -> Dict[str, Range]:
    return dict.fromkeys(names.split(), kind)


RANGES: Dict[str, Range] = {
    # images and batches
    **_all(_AT_LEAST_1, 'img_size in_chans input_size batch_size global_batch_size contrast_batch_size'),
    **_all(_AT_LEAST_0, 'train_num_samples val_num_samples validation_batch_size epoch_repeats workers crop_pct'),
    'mean': Range(-10, 10),  # of pixels between 0 and 1, as in timm
    'std': Range(0, 10, above=True),
    'label_fraction': Range(0, 1, above=True),
    'val_fraction': _CONFLICTS,
    'multilabel_threshold': Range(0, 1, above=True, below=True),
    'ignore_index': Range(-(2**31), 2**31 - 1),
    # augmentation
    'scale': Range(0, num_values=2),
    'ratio': Range(0, above=True, num_values=2),
    **_all(_SHARE, 'hflip vflip color_jitter_prob grayscale_prob gaussian_blur_prob reprob'),
    **_all(_AT_LEAST_0, 'color_jitter aug_repeats aug_splits'),
    **_all(_AT_LEAST_1, 'recount gpu_augment_size'),
    # mixing of pixels
    **_all(_AT_LEAST_0, 'mixup cutmix mixup_off_epoch'),
    'cutmix_minmax': Range(0, 1, num_values=2),
    **_all(_SHARE, 'mixup_prob mixup_switch_prob'),
    # sizes that change, NaFlex
    **_all(_AT_LEAST_1, 'train_img_sizes train_batch_sizes train_batches_per_epoch'),
    **_all(_AT_LEAST_0, 'train_size_probs train_size_schedule_spread naflex_patch_size_probs'),
    **_all(_SHARE, 'train_size_random_mix'),
    **_all(_AT_LEAST_1, 'naflex_train_seq_lens naflex_max_seq_len naflex_patch_sizes'),
    # the model
    **_all(_AT_LEAST_1, 'num_classes checkpoint_frames'),
    **_all(_ANY, 'head_init_scale head_init_bias'),
    **_all(_SHARE, 'drop drop_path drop_block bn_momentum model_ema_decay'),
    **_all(_AT_LEAST_0, 'bn_eps'),
    'drop_connect': _CONFLICTS,
    # losses
    **_all(_AT_LEAST_0, 'contrast_weight coretune_positive_candidates'),
    **_all(_ABOVE_0, 'coretune_alpha coretune_smooth_weight contrast_temperature kd_temperature'),
    **_all(_SHARE, 'coretune_min_positive_lam coretune_min_negative_lam bce_target_thresh'),
    **_all(_AT_LEAST_1, 'projection_dim anchors_per_image kd_student_feature_dim kd_teacher_feature_dim'),
    **_all(_BELOW_1, 'smoothing'),
    **_all(_AT_LEAST_0, 'bce_pos_weight loss_weight_power poly_gamma distill_loss_weight task_loss_weight'),
    'poly_epsilon': _ANY,
    # optimizer
    **_all(_AT_LEAST_0, 'opt_eps momentum weight_decay layer_decay layer_decay_min_scale layer_decay_no_opt_scale'),
    **_all(_BELOW_1, 'opt_betas'),
    'clip_grad': Range(0, may_be_infinite=True),  # infinity measures the norm, and clips nothing
    'grad_accum_steps': _ANY,  # less than 1 is 1, as in timm
    'head_lr_scale': _ABOVE_0,
    # learning rate
    **_all(_AT_LEAST_0, 'lr lr_base warmup_lr min_lr lr_noise lr_noise_pct lr_noise_std'),
    **_all(_AT_LEAST_1, 'lr_base_size'),
    **_all(_ABOVE_0, 'lr_cycle_mul decay_epochs lr_stable_timescale'),
    **_all(_AT_LEAST_0, 'lr_cycle_decay lr_cycle_limit lr_k_decay decay_rate decay_milestones'),
    **_all(_AT_LEAST_0, 'epochs warmup_epochs cooldown_epochs patience_epochs freeze_epochs'),
    # loop and output
    'local_rank': _CONFLICTS,
    'seed': Range(0, 2**32 - 1),  # NumPy takes no other
    **_all(_AT_LEAST_0, 'start_epoch tta recovery_interval watch_features'),
    'time_limit': _ABOVE_0,
    **_all(_AT_LEAST_1, 'stop_epoch save_epochs log_interval val_interval patience checkpoint_hist'),
}


def find_out_of_range(settings: Settings) -> List[str]:
    """Error messages about numbers that are out of range. Each begins with its flag."""
    values = settings.flat()
    groups = [type(getattr(settings, group.name)) for group in dataclasses.fields(settings)]
    found = []
    for name in numbers_of(groups):
        value, allowed = values[name], RANGES[name]
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if value is not None and not (
            len(numbers) == (allowed.num_values or len(numbers)) and all(map(allowed.has, numbers))
        ):
            found.append(f'--{name.replace("_", "-")}: {allowed}, got {" ".join(map(str, numbers))}')
    return found
