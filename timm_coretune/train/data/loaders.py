"""Loaders: timm's, from the arguments"""

import argparse
import inspect
from typing import Any, Dict, NamedTuple, Optional

import timm
import torch
from accelerate import Accelerator
from timm.data import AugMixDataset, FastCollateMixup, Mixup, create_loader
from torch.utils.data import Dataset, IterableDataset

from ..cli.arguments import mixes_pixels
from ..segmentation import create_train_loader, create_validation_loader
from .class_balance import ClassBalancedBatchSampler
from .datasets import Datasets, get_labels
from .resumable import make_resumable


class Loaders(NamedTuple):
    """Loaders of both splits, and pixel mixup where the training loader does not do it itself."""

    train: Any
    validation: Any
    mixup_fn: Optional[Mixup]


def _mixup_kwargs(args: argparse.Namespace, num_classes: int) -> Dict[str, Any]:
    return dict(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )


class LoaderFactory:
    """Creates timm's loaders of both splits.

    Args:
        args: Arguments of the run.
        data_config: What images are resized to and normalised by, from timm's resolve_data_config.
        model: The model, which tells the number of classes and the patch size.
        accelerator: Device and processes.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        data_config: Dict[str, Any],
        model: torch.nn.Module,
        accelerator: Accelerator,
    ):
        self.args = args
        self.data_config = data_config
        self.accelerator = accelerator
        self.num_classes = model.num_classes
        self.patch_size = model.get_patch_size() if hasattr(model, 'get_patch_size') else (16, 16)
        self.common = dict(
            mean=data_config['mean'],
            std=data_config['std'],
            pin_memory=args.pin_mem,
            img_dtype=getattr(torch, args.model_dtype or 'float32'),
            device=accelerator.device,
            distributed=accelerator.num_processes > 1,
            use_prefetcher=not args.no_prefetcher,
            persistent_workers=args.workers > 0,
        )

    def create(self, datasets: Datasets) -> Loaders:
        """Create the loaders.

        Raises:
            ValueError: The training split does not fill one batch, or cannot be read in the order asked for.
        """
        args, train = self.args, None
        if datasets.train is not None:
            create_train = self._create_naflex_train if args.naflex_loader else self._create_train
            train = create_train(datasets.train)
            if len(train) == 0:
                raise ValueError(
                    f'Expected at least one batch of {args.batch_size} images for each of '
                    f'{self.accelerator.num_processes} process(es), the training split has {len(datasets.train)}. '
                    'Lower --batch-size.'
                )
        validation = None if datasets.validation is None else self._create_validation(datasets.validation)
        mixup_fn = None
        if mixes_pixels(args) and args.no_prefetcher and not args.naflex_loader:
            mixup_fn = Mixup(**_mixup_kwargs(args, self.num_classes))
        return Loaders(train, validation, mixup_fn)

    def _train_kwargs(self) -> Dict[str, Any]:
        args = self.args
        interpolation = args.train_interpolation
        if args.no_aug or not interpolation:
            interpolation = self.data_config['interpolation']
        return dict(
            batch_size=args.batch_size,
            is_training=True,
            no_aug=args.no_aug,
            re_prob=args.reprob,
            re_mode=args.remode,
            re_count=args.recount,
            re_split=args.resplit,
            train_crop_mode=args.train_crop_mode,
            scale=args.scale,
            ratio=args.ratio,
            hflip=args.hflip,
            vflip=args.vflip,
            color_jitter=args.color_jitter,
            color_jitter_prob=args.color_jitter_prob,
            grayscale_prob=args.grayscale_prob or 0.0,
            gaussian_blur_prob=args.gaussian_blur_prob or 0.0,
            auto_augment=args.aa,
            num_aug_repeats=args.aug_repeats,
            num_aug_splits=args.aug_splits,
            interpolation=interpolation,
            num_workers=args.workers,
            worker_seeding=args.worker_seeding,
            **self.common,
        )

    def _create_train(self, dataset: Dataset) -> Any:
        args, accelerator = self.args, self.accelerator
        if args.segmentation:
            return create_train_loader(args, self.data_config, dataset, accelerator)
        is_stream = isinstance(dataset, IterableDataset)
        if args.aug_repeats and accelerator.num_processes == 1:
            raise ValueError('--aug-repeats deals the repeats of an image out to processes, there is one.')
        batch_sampler = self._create_balanced_sampler(dataset) if args.class_balance else None
        if args.aug_splits:
            dataset = AugMixDataset(dataset, num_splits=args.aug_splits)
        sizes = {}
        if args.train_img_sizes:
            if 'input_size_choices' not in inspect.signature(create_loader).parameters:
                raise ValueError(f'--train-img-sizes needs a newer timm than {timm.__version__}: pip install -U timm')
            progressive = args.train_size_schedule == 'progressive'
            sizes = dict(
                input_size_choices=args.train_img_sizes,
                batch_size_choices=args.train_batch_sizes,
                batch_choice_weights=args.train_size_probs,
                batch_choice_seed=args.seed,
                batch_choice_schedule=args.train_size_schedule,
                batch_schedule_epochs=args.epochs if progressive else None,
                batch_schedule_spread=args.train_size_schedule_spread,
                batch_schedule_random_mix=args.train_size_random_mix,
                num_batches=args.train_batches_per_epoch,
            )
        in_loader = mixes_pixels(args) and not args.no_prefetcher
        loader = create_loader(
            dataset,
            input_size=self.data_config['input_size'],
            collate_fn=FastCollateMixup(**_mixup_kwargs(args, self.num_classes)) if in_loader else None,
            use_multi_epochs_loader=args.use_multi_epochs_loader,
            **sizes,
            **self._train_kwargs(),
        )
        if is_stream:
            return loader
        return make_resumable(
            loader,
            args.seed,
            accelerator.process_index,
            accelerator.num_processes,
            batch_sampler=batch_sampler,
            mixup_off_epoch=args.mixup_off_epoch,
        )

    def _create_balanced_sampler(self, dataset: Dataset) -> ClassBalancedBatchSampler:
        labels = get_labels(dataset)
        if labels is None:
            raise ValueError(
                'Expected a data set that knows the labels of all images for --class-balance, as folders, safetensors, '
                'torch/ and hfds/ do. A stream does not.'
            )
        return ClassBalancedBatchSampler(
            labels,
            self.args.batch_size,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.args.seed,
        )

    def _create_naflex_train(self, dataset: Dataset) -> Any:
        from timm.data import NaFlexMixup, create_naflex_loader

        args = self.args
        mixup_fn = None
        if mixes_pixels(args):
            kwargs = _mixup_kwargs(args, self.num_classes)
            for unsupported in ('mode', 'cutmix_minmax'):
                kwargs.pop(unsupported)
            mixup_fn = NaFlexMixup(**kwargs)
            mixup_fn.mixup_off_epoch = args.mixup_off_epoch
        patches = dict(patch_size=self.patch_size)
        if args.naflex_patch_sizes:
            patches = dict(
                patch_size_choices=args.naflex_patch_sizes,
                patch_size_choice_probs=args.naflex_patch_size_probs,
            )
        return create_naflex_loader(
            dataset,
            train_seq_lens=args.naflex_train_seq_lens,
            mixup_fn=mixup_fn,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            seed=args.seed,
            patchify_channels_last=not args.naflex_patchify_channels_first,
            **patches,
            **self._train_kwargs(),
        )

    def _create_validation(self, dataset: Dataset) -> Any:
        args = self.args
        if args.segmentation:
            return create_validation_loader(args, self.data_config, dataset, self.accelerator)
        kwargs = dict(
            batch_size=args.validation_batch_size or args.batch_size,
            interpolation=self.data_config['interpolation'],
            crop_pct=self.data_config['crop_pct'],
            num_workers=args.workers,
            **self.common,
        )
        if self.accelerator.num_processes > 1 and any(name in args.dataset for name in ('tfds', 'wds')):
            kwargs['num_workers'] = min(2, args.workers)  # as timm does, their shards pad less with few workers
        if args.naflex_loader:
            from timm.data import create_naflex_loader

            return create_naflex_loader(
                dataset,
                patch_size=self.patch_size,
                max_seq_len=args.naflex_max_seq_len,
                patchify_channels_last=not args.naflex_patchify_channels_first,
                **kwargs,
            )
        return create_loader(dataset, input_size=self.data_config['input_size'], **kwargs)


def mean_batch_size(args: argparse.Namespace, loader: Any) -> float:
    """Images of a batch on average, where sizes are scheduled, as timm scales the learning rate by it."""
    if args.train_img_sizes and loader is not None:
        return loader.batch_sampler.batches.average_batch_size
    return float(args.batch_size)
