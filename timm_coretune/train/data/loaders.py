"""Creates timm's loaders of labelled images, made to start at any batch of an epoch"""

import logging
import random
from typing import Any, Dict, NamedTuple, Optional, Sized, Tuple, cast

import torch
from accelerate import Accelerator
from timm.data import (
    AugMixDataset,
    FastCollateMixup,
    Mixup,
    NaFlexMixup,
    create_loader,
    create_naflex_loader,
)
from torch.utils.data import Dataset, IterableDataset

from ...data.class_balance import ClassBalancedBatchSampler
from ...data.device_augment import CollateStored, DeviceAugment
from ...data.resumable import make_resumable
from ..cli.settings import DataSettings
from .datasets import Datasets
from .labelled import LabelledSubset, copy_of, get_labels
from .workers import outliving_signals

_logger = logging.getLogger(__name__)


NUM_WATCHED = 2048  # images of a split whose features are measured, at most
_WATCH_SEED = 0  # not --seed: runs of other seeds are compared on the same images


class Loaders(NamedTuple):
    """Loaders of both splits, and pixel mixup if the training loader does not apply it itself.

    Attributes:
        train: Training batches.
        validation: Validation batches.
        mixup_fn: Pixel mixup for the training batches.
        watched: Loaders of validation images and training images whose features are measured, both prepared as for
            validation. None if nothing is measured.
    """

    train: Any
    validation: Any
    mixup_fn: Optional[Mixup]
    watched: Optional[Tuple[Any, Any]] = None


def _mixup_kwargs(settings: DataSettings, smoothing: float, num_classes: int) -> Dict[str, Any]:
    return dict(
        mixup_alpha=settings.mixup,
        cutmix_alpha=settings.cutmix,
        cutmix_minmax=settings.cutmix_minmax,
        prob=settings.mixup_prob,
        switch_prob=settings.mixup_switch_prob,
        mode=settings.mixup_mode,
        label_smoothing=smoothing,
        num_classes=num_classes,
        multi_label=settings.is_multi_label,
    )


class LoaderFactory:
    """Creates timm's loaders of both splits.

    Args:
        settings: Augmentation, batches and loader processes.
        data_config: Size, normalisation and interpolation of images, from timm's resolve_data_config.
        model: Model that gives the number of classes and the patch size.
        accelerator: Device and processes.
        img_dtype: Dtype of the images.
        smoothing: Label smoothing, which pixel mixup applies to its soft targets.
        seed: Seed for the order and the augmentation of images.
        epochs: Number of epochs, over which a progressive schedule of image sizes grows.
    """

    def __init__(
        self,
        settings: DataSettings,
        data_config: Dict[str, Any],
        model: torch.nn.Module,
        accelerator: Accelerator,
        img_dtype: torch.dtype = torch.float32,
        smoothing: float = 0.0,
        seed: int = 42,
        epochs: int = 1,
    ):
        self.settings = settings
        self.data_config = data_config
        self.accelerator = accelerator
        self.seed = seed
        self.epochs = epochs
        get_patch_size: Any = getattr(model, 'get_patch_size', None)
        self.patch_size = get_patch_size() if get_patch_size is not None else (16, 16)
        self.mixup_kwargs = _mixup_kwargs(settings, smoothing, cast(int, model.num_classes))
        self.common = dict(
            mean=data_config['mean'],
            std=data_config['std'],
            pin_memory=settings.pin_mem,
            img_dtype=img_dtype,
            device=accelerator.device,
            distributed=accelerator.num_processes > 1,
            use_prefetcher=not settings.no_prefetcher,
            persistent_workers=settings.workers > 0,
        )

    def create(self, datasets: Datasets, with_watched: bool = False) -> Loaders:
        """Create the loaders.

        Args:
            datasets: Both splits.
            with_watched: Whether to create loaders of the images whose features are measured.

        Raises:
            ValueError: The training split does not fill one batch, or --class-balance or --aug-repeats is impossible.
        """
        settings, train = self.settings, None
        if datasets.train is not None:
            create_train = self._create_naflex_train if settings.naflex_loader else self._create_train
            train = create_train(datasets.train)
            check_fills_a_batch(train, datasets.train, settings.batch_size, self.accelerator.num_processes)
        validation = None if datasets.validation is None else self._create_validation(datasets.validation)
        mixup_fn = None
        if settings.mixes_pixels and not settings.naflex_loader and not settings.mixes_in_loader:
            mixup_fn = Mixup(**self.mixup_kwargs)
        watched = None
        if with_watched:
            validated, trained = datasets.validation, datasets.train
            watched = self._create_watched(validated, 'validation'), self._create_watched(trained, 'training')
        return Loaders(train, validation, mixup_fn, watched)

    def _create_watched(self, dataset: Optional[Dataset], name: str) -> Any:
        if dataset is None or isinstance(dataset, IterableDataset):
            raise ValueError(
                'Expected training and validation images that can be read in any order for --watch-features, as '
                f'folders, safetensors, torch/ and hfds/ have, got {"none" if dataset is None else "a stream"}. Leave '
                'the flag out.'
            )
        total = len(cast(Sized, dataset))
        _logger.info(f'Features are measured of {min(total, NUM_WATCHED)} of the {total} {name} images.')
        indices = sorted(random.Random(_WATCH_SEED).sample(range(total), min(total, NUM_WATCHED)))
        return self._create_validation(LabelledSubset(copy_of(dataset), indices), persistent_workers=False)

    def _train_kwargs(self) -> Dict[str, Any]:
        settings = self.settings
        interpolation = settings.train_interpolation
        if settings.no_aug or not interpolation:
            interpolation = self.data_config['interpolation']
        return dict(
            batch_size=settings.batch_size,
            is_training=True,
            no_aug=settings.no_aug,
            re_prob=settings.reprob,
            re_mode=settings.remode,
            re_count=settings.recount,
            re_split=settings.resplit,
            train_crop_mode=settings.train_crop_mode,
            scale=settings.scale,
            ratio=settings.ratio,
            hflip=settings.hflip,
            vflip=settings.vflip,
            color_jitter=settings.color_jitter,
            color_jitter_prob=settings.color_jitter_prob,
            grayscale_prob=settings.grayscale_prob or 0.0,
            gaussian_blur_prob=settings.gaussian_blur_prob or 0.0,
            auto_augment=settings.aa,
            num_aug_repeats=settings.aug_repeats,
            num_aug_splits=settings.aug_splits,
            interpolation=interpolation,
            num_workers=settings.workers,
            worker_seeding=settings.worker_seeding,
            **self.common,
        )

    def _size_kwargs(self) -> Dict[str, Any]:
        settings = self.settings
        if not settings.train_img_sizes:
            return {}
        return dict(
            input_size_choices=settings.train_img_sizes,
            batch_size_choices=settings.train_batch_sizes,
            batch_choice_weights=settings.train_size_probs,
            batch_choice_seed=self.seed,
            batch_choice_schedule=settings.train_size_schedule,
            batch_schedule_epochs=self.epochs if settings.train_size_schedule == 'progressive' else None,
            batch_schedule_spread=settings.train_size_schedule_spread,
            batch_schedule_random_mix=settings.train_size_random_mix,
            num_batches=settings.train_batches_per_epoch,
        )

    def _create_train(self, dataset: Dataset) -> Any:
        settings, accelerator = self.settings, self.accelerator
        is_stream = isinstance(dataset, IterableDataset)
        if settings.aug_repeats and accelerator.num_processes == 1:
            raise ValueError('--aug-repeats deals the repeats of an image out to processes, there is one.')
        batch_sampler = self._create_balanced_sampler(dataset) if settings.class_balance else None
        if settings.aug_splits:
            dataset = AugMixDataset(dataset, num_splits=settings.aug_splits)
        collate_fn: Any = FastCollateMixup(**self.mixup_kwargs) if settings.mixes_in_loader else None
        augment = self._device_augment() if settings.gpu_augment else None
        if augment is not None:
            collate_fn = CollateStored(augment)
        loader = cast(Any, create_loader)(
            dataset,
            input_size=self.data_config['input_size'],
            collate_fn=collate_fn,
            use_multi_epochs_loader=settings.use_multi_epochs_loader,
            **self._size_kwargs(),
            **self._train_kwargs(),
        )
        if augment is not None:
            cast(Any, dataset).transform = augment  # in place of the one that timm's loader sets
        loader = outliving_signals(loader)
        if is_stream:
            return loader
        return make_resumable(
            loader,
            self.seed,
            accelerator.process_index,
            accelerator.num_processes,
            batch_sampler=batch_sampler,
            mixup_off_epoch=settings.mixup_off_epoch,
        )

    def _device_augment(self) -> DeviceAugment:
        settings, (num_channels, *size) = self.settings, self.data_config['input_size']
        augment = DeviceAugment(
            size=(size[0], size[1]),
            # the share in which timm's validation resizes images before its crop, by default
            stored_size=settings.gpu_augment_size or round(max(size) / 0.875),
            scale=settings.scale,
            ratio=settings.ratio,
            interpolation=settings.train_interpolation or self.data_config['interpolation'],
            hflip=settings.hflip,
            vflip=settings.vflip,
            color_jitter=settings.color_jitter,
            color_jitter_prob=settings.color_jitter_prob,
            grayscale_prob=settings.grayscale_prob or 0.0,
            gaussian_blur_prob=settings.gaussian_blur_prob or 0.0,
        )
        augment.check(num_channels)
        return augment

    def _create_balanced_sampler(self, dataset: Dataset) -> ClassBalancedBatchSampler:
        labels = get_labels(dataset)
        if labels is None:
            raise ValueError(
                'Expected a data set that knows the labels of all images for --class-balance, as folders, safetensors, '
                'torch/ and hfds/ do. A stream does not.'
            )
        return ClassBalancedBatchSampler(
            labels,
            self.settings.batch_size,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.seed,
        )

    def _create_naflex_train(self, dataset: Dataset) -> Any:
        settings = self.settings
        mixup_fn = None
        if settings.mixes_pixels:
            unsupported = ('mode', 'cutmix_minmax')
            mixup_fn = NaFlexMixup(**{k: v for k, v in self.mixup_kwargs.items() if k not in unsupported})
            mixup_fn.mixup_off_epoch = settings.mixup_off_epoch
        patches: Dict[str, Any] = dict(patch_size=self.patch_size)
        if settings.naflex_patch_sizes:
            patches = dict(
                patch_size_choices=settings.naflex_patch_sizes,
                patch_size_choice_probs=settings.naflex_patch_size_probs,
            )
        loader = create_naflex_loader(
            dataset,
            train_seq_lens=tuple(settings.naflex_train_seq_lens),
            mixup_fn=mixup_fn,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            seed=self.seed,
            patchify_channels_last=not settings.naflex_patchify_channels_first,
            **patches,
            **self._train_kwargs(),
        )
        return outliving_signals(loader)

    def _create_validation(self, dataset: Dataset, **further: Any) -> Any:
        settings = self.settings
        num_workers = settings.workers
        if self.accelerator.num_processes > 1 and any(name in settings.dataset for name in ('tfds', 'wds')):
            num_workers = min(2, settings.workers)  # as in timm: with fewer workers these data sets repeat fewer images
        kwargs = dict(
            batch_size=settings.validation_batch_size or settings.batch_size,
            interpolation=self.data_config['interpolation'],
            crop_pct=self.data_config['crop_pct'],
            num_workers=num_workers,
            **{**self.common, **further},
        )
        if settings.naflex_loader:
            loader = create_naflex_loader(
                dataset,
                patch_size=self.patch_size,
                max_seq_len=settings.naflex_max_seq_len,
                patchify_channels_last=not settings.naflex_patchify_channels_first,
                **kwargs,
            )
        else:
            loader = cast(Any, create_loader)(dataset, input_size=self.data_config['input_size'], **kwargs)
        return outliving_signals(loader)


def check_fills_a_batch(loader: Any, dataset: Dataset, batch_size: int, num_processes: int) -> None:
    """Raise a ValueError if a training loader has not a single batch."""
    if len(loader) == 0:
        raise ValueError(
            f'Expected at least one batch of {batch_size} images for each of {num_processes} process(es), the training '
            f'split has {len(cast(Sized, dataset))}. Lower --batch-size.'
        )


def count_contrast_batches(settings: DataSettings, num_batches: int) -> int:
    """Number of contrasted batches in an epoch of num_batches batches of the loader. The last one may be smaller.

    Raises:
        ValueError: The epoch does not fill one.
    """
    together = settings.contrast_batches
    if num_batches < together:
        total = settings.contrast_batch_size
        size = settings.global_batch_size or settings.batch_size
        raise ValueError(
            f'--contrast-batch-size: expected at most {num_batches * size}, the images of the {num_batches} batch(es) '
            f'of {size} of an epoch, got {total}. Lower it.'
        )
    num_left = num_batches % together
    if num_left:
        _logger.info(
            f'An epoch has {num_batches} batches, and contrasts {together} at a time: the last {num_left} of an epoch '
            'are contrasted with each other only.'
        )
    return -(-num_batches // together)


def mean_batch_size(settings: DataSettings, loader: Any) -> float:
    """Mean number of images per batch and process. As in timm, the learning rate is scaled by it if sizes vary."""
    if settings.train_img_sizes and loader is not None:
        return loader.batch_sampler.batches.average_batch_size
    return float(settings.batch_size)
