"""Options of the training loop"""

from dataclasses import dataclass
from typing import Optional, Tuple

import torch


@dataclass(frozen=True)
class LoopConfig:
    """Options of the training loop.

    Attributes:
        seed: Random seed. The draws of a step depend on it and on the process, epoch and batch of the step. With a
            resumable loader and without `mixup_fn` this holds for torch's generators, not for Python's and NumPy's.
        contrast_batches: Batches whose images are mined and contrasted together, by CachedStep if there are several.
            The last ones of an epoch may be fewer.
        grad_accum_steps: Batches per update, or groups of contrast_batches batches.
        channels_last: Put images into the channels_last memory layout.
        dtype: Dtype that images are cast to. None leaves them as the loader made them.
        loss_scale: How the loss is scaled by batch size / reference_batch_size: 'none', 'sqrt' or 'linear'.
        reference_batch_size: Batch size at which the loss is not scaled.
        uneven_batches: Whether processes may hold batches of different sizes.
        log_interval: Updates between log lines.
        val_interval: Epochs between validations.
        save_epochs: Numbers of epochs after which there is a validation too, and the record keeps the state.
        recovery_interval: Updates between training states saved within an epoch, 0 for none.
        synchronize_step: Wait for the device after every update.
        dist_bn: How processes share BatchNorm statistics after an epoch: 'reduce', 'broadcast', 'none' or ''.
        validate_ema: Validate the moving average of the weights too. The better of both is the score of an epoch.
        ema_publish: Whose score counts if there is a moving average: 'better' for the better of both, or 'ema'.
        tta: Number of neighbouring images whose outputs are averaged in validation, 0 for none.
        eval_metric: Name of the score that selects the best epoch. Without validation it is the training loss.
        patience: Validations without improvement after which training stops, None for never.
        mixup_off_epoch: First epoch without pixel mixup, 0 for never.
        catch_diverged: Look at the losses of every batch before the update, so that the record can keep a step that
            diverged. One process on a CPU always does so. Elsewhere it waits for the device and for other processes.
        progress: Show bars on a terminal or in a notebook.
    """

    seed: int = 42
    contrast_batches: int = 1
    grad_accum_steps: int = 1
    channels_last: bool = False
    dtype: Optional[torch.dtype] = None
    loss_scale: str = 'none'
    reference_batch_size: float = 1.0
    uneven_batches: bool = False
    log_interval: int = 50
    val_interval: int = 1
    save_epochs: Tuple[int, ...] = ()
    recovery_interval: int = 0
    synchronize_step: bool = False
    dist_bn: str = 'reduce'
    validate_ema: bool = True
    ema_publish: str = 'better'
    tta: int = 0
    eval_metric: str = 'top1'
    patience: Optional[int] = None
    mixup_off_epoch: int = 0
    catch_diverged: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        if self.dist_bn not in ('reduce', 'broadcast', 'none', ''):
            raise ValueError(f"Expected dist_bn to be 'reduce', 'broadcast', 'none' or '', got {self.dist_bn!r}.")

    @property
    def batches_per_update(self) -> int:
        return self.contrast_batches * self.grad_accum_steps
