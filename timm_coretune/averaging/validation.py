"""Validates other weights in place of those of a run, as the run did, and computes statistics of BatchNorm for them"""

import dataclasses
import os
from typing import Any, Dict, Iterator, List, Mapping, cast

import torch
import torch.nn as nn
from timm.utils import unwrap_model
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from ..data.seeding import kept_generators, make_key, seed_generators
from ..run_folder import ARGS_NAME
from ..train.cli.arguments import ParsedArguments, parse_args
from ..train.cli.settings import LoopSettings, LossSettings, OutputSettings
from ..train.data.batches import batches_from, to_device
from ..train.processes import share_batch
from ..train.session import Run, kind_of, prepare_process, set_up

# settings of the loop that its validation has a use for
_OF_VALIDATION = (
    *('device', 'device_modules', 'amp', 'amp_dtype', 'seed', 'dist_bn', 'eval_metric', 'metrics', 'tta'),
)


def parse_run(folder: str, overrides: List[str]) -> ParsedArguments:
    """The arguments of a run.

    Args:
        folder: Output folder of the run.
        overrides: Flags of train.py that win over them.

    Raises:
        ValueError: There is no such run.
    """
    path = os.path.join(folder, ARGS_NAME)
    if not os.path.isfile(path):
        raise ValueError(
            f'Expected the output folder of a run of train.py in {folder!r}, found no {ARGS_NAME} there. It tells '
            'which images to validate on. To average weights without validation there is timm_coretune.average_weights.'
        )
    return parse_args(['-c', path, *overrides])


class Validation:
    """The validation of a run, for any weights of its model.

    Args:
        parsed: Arguments of the run.
        weights: Path of its weights.
        with_training: Open the training images too, from which `update_batch_norm` computes statistics.

    Raises:
        ValueError: There are several processes, or no validation images.
    """

    def __init__(self, parsed: ParsedArguments, weights: str, with_training: bool):
        settings = parsed.settings
        settings = dataclasses.replace(
            settings,
            data=dataclasses.replace(settings.data, contrast_batch_size=None),
            model=dataclasses.replace(
                settings.model,
                pretrained=False,
                pretrained_path=None,
                initial_checkpoint=weights,
                checkpoint_key=None,
                model_ema=False,
                torchcompile=None,
                torchscript=False,
            ),
            loss=LossSettings(smoothing=settings.loss.smoothing),  # nothing is trained: no teacher, no projection head
            loop=LoopSettings(eval_only=True, **{name: getattr(settings.loop, name) for name in _OF_VALIDATION}),
            output=OutputSettings(),
        )
        accelerator = prepare_process(parsed._replace(settings=settings))
        if accelerator.num_processes > 1:
            raise ValueError(
                f'Expected one process, got {accelerator.num_processes}. Run it without accelerate launch.'
            )
        self.settings = share_batch(settings, 1)
        self.kind = kind_of(self.settings)
        opening = dataclasses.replace(settings.loop, eval_only=not with_training)
        datasets = self.kind.open_datasets(dataclasses.replace(self.settings, loop=opening))
        if datasets.validation is None:
            raise ValueError(
                'Expected a run with validation images, by which the weights are chosen. This one has none '
                "(--val-split ''). timm_coretune.average_weights averages without choosing."
            )
        self.run: Run = set_up(parsed._replace(settings=self.settings), self.kind, accelerator, datasets)

    @property
    def model(self) -> nn.Module:
        return cast(nn.Module, unwrap_model(self.run.trainer.task.get_eval_model()))

    @property
    def metric(self) -> str:
        """The score that selects the best epoch of the run."""
        return self.run.resolved.eval_metric

    def __call__(self, state: Mapping[str, torch.Tensor], num_images: int = 0) -> Dict[str, float]:
        """Put weights into the model and compute their scores.

        Args:
            state: The weights.
            num_images: Training images from which the statistics of BatchNorm are computed first, 0 for none.
        """
        self.model.load_state_dict(state)
        if num_images:
            self.update_batch_norm(num_images)
        return self.run.trainer.validator.evaluate(self.run.loaders.validation)

    def _training_images(self, num_images: int) -> Iterator[Any]:
        config, device = self.run.trainer.config, self.run.trainer.accelerator.device
        for index, batch in enumerate(batches_from(self.run.loaders.train, epoch=0)):
            seed_generators(make_key(config.seed, 0, 0, index), device)
            input, target = to_device(batch, device, config.channels_last, config.dtype)
            yield input
            num_images -= len(target)
            if num_images <= 0:
                return

    def update_batch_norm(self, num_images: int) -> None:
        """Compute the statistics of BatchNorm of the weights in the model, as the mean over training batches.

        The images are augmented as in training. The same weights always see the same images.
        """
        with kept_generators(self.run.trainer.accelerator.device):
            update_bn(self._training_images(num_images), self.model)


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a model has statistics of BatchNorm."""
    return any(isinstance(module, _BatchNorm) and module.track_running_stats for module in model.modules())
