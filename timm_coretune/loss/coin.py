"""Contrastive initialization (COIN)

Paper: `Improving Fine-tuning of Self-supervised Models with Contrastive Initialization`
    - Haolin Pan, Yong Guo, Qinyi Deng, Haomin Yang, Yiqun Chen, Jian Chen, 2022, https://arxiv.org/abs/2208.00238

Written from the paper. Both parts are one run here, with one schedule of the learning rate, as in the released code.
"""

from typing import Any, Optional, Union, cast

import torch
import torch.nn as nn

from .scl import SCLLoss


class COINLoss(SCLLoss):
    """SupCon alone for the first share of the run, then cross-entropy + contrast_weight x SupCon.

    In the first part the classifier does not train: its gradient is zero, and accuracy in validation stays at chance.
    So do not stop a run there: `--patience` must be longer than the first part, and `--sched plateau` does not fit.

    The loss needs to know the length of the run. train.py tells it. In a loop of your own call `start(num_updates)`
    before the first step, and `after_update(model)` after each update. The count of updates is part of the state, so a
    resumed run is where it was. Resuming with another number of epochs moves the end of the first part.

    A step costs as much as one of SCL.

    Args:
        num_features: Width D of the pre-logits features, or the model.
        contrast_only: Share of the updates in which there is no cross-entropy, in [0, 1).
        contrast_weight: Weight of the contrastive loss in the second part, > 0. In the first part its weight is 1.
        temperature: Temperature of the contrastive loss, which divides cosine similarities, > 0.
        **kwargs: Arguments of ContrastiveLoss and TaskLoss.

    Raises:
        ValueError: An argument is out of its range.
    """

    num_done: torch.Tensor

    for_multi_label = False

    def __init__(
        self,
        num_features: Union[int, nn.Module],
        contrast_only: float = 0.7,
        contrast_weight: float = 0.1,
        temperature: float = 0.3,
        **kwargs: Any,
    ):
        super().__init__(num_features, contrast_weight=contrast_weight, temperature=temperature, **kwargs)
        if not 0.0 <= contrast_only < 1.0:
            raise ValueError(
                f'Expected contrast_only in [0, 1), got {contrast_only}. With 1 the classifier would never train.'
            )
        self.contrast_only = contrast_only
        self.register_buffer('num_done', torch.zeros((), dtype=torch.int64))
        self.num_contrast_only: Optional[int] = None  # no state: a resumed run may have another length

    def extra_repr(self) -> str:
        return f'contrast_only={self.contrast_only}, {super().extra_repr()}'

    def start(self, num_updates: int) -> None:
        """Tell the number of updates of the whole run.

        Raises:
            ValueError: There is no update.
        """
        if num_updates < 1:
            raise ValueError(f'Expected num_updates >= 1, the updates of the whole run, got {num_updates}.')
        self.num_contrast_only = round(self.contrast_only * num_updates)

    def prepare(self, batch_size: int, device: torch.device, rows_per_image: int = 1) -> Any:
        if self.num_contrast_only is None:
            raise RuntimeError(
                'Expected the length of the run. Call start(num_updates) of the task or the loss before the first '
                'step, and after_update(model) after each update.'
            )
        return super().prepare(batch_size, device, rows_per_image)

    def weigh(self, task_loss: torch.Tensor, contrast_loss: torch.Tensor) -> torch.Tensor:
        # a tensor, not a branch: a step neither waits for the device nor is compiled anew, and the classifier gets a
        # gradient of zero rather than none, which would stall DistributedDataParallel
        is_first = self.num_done < cast(int, self.num_contrast_only)
        return torch.where(is_first, contrast_loss, super().weigh(task_loss, contrast_loss))

    def after_update(self, model: nn.Module) -> None:
        self.num_done += 1
