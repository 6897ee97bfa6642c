#!/usr/bin/env python3
"""Which timm models can be the backbone of a segmentation, and what is made of them?

    python benchmarks/backbones.py

creates each with random weights, makes a training step of dense Core-tuning, and prints one Markdown table: the head
that is chosen, the feature maps it stands on, the width of a pixel's features, and parameters. A line is printed only
if the output has the size of the image, and every parameter that trains has got a finite gradient.
"""

import argparse
import sys
from typing import Any, Dict, Tuple

import torch

from timm_coretune import SegmentationTask, create_segmentation_model

# name, arguments of create_segmentation_model
_BACKBONES: Tuple[Tuple[str, Dict[str, Any]], ...] = (
    ('resnet50', {'output_stride': 8}),
    ('resnet50', {}),
    ('resnext50_32x4d', {'output_stride': 16}),
    ('regnety_016', {'output_stride': 16}),
    ('convnext_tiny', {'output_stride': 16}),
    ('convnext_tiny', {}),
    ('efficientnet_b0', {'output_stride': 16}),
    ('mobilenetv3_large_100', {}),
    ('nfnet_l0', {}),
    ('densenet121', {}),
    ('hrnet_w18', {}),
    ('fastvit_t8', {}),
    ('repvit_m1', {}),
    ('edgenext_small', {}),
    ('pvt_v2_b1', {}),
    ('swin_tiny_patch4_window7_224', {}),
    ('maxvit_rmlp_pico_rw_256', {}),
    ('vit_small_patch16_224', {}),
    ('vit_small_patch14_dinov2', {}),
    ('vit_small_patch16_dinov3', {}),
    ('vit_small_patch16_dinov3', {'head': 'linear'}),
    ('vit_small_patch16_dinov3', {'head': 'eomt'}),
    ('eva02_tiny_patch14_224', {}),
    ('deit3_small_patch16_224', {}),
    ('xcit_nano_12_p16_224', {}),
    ('mambaout_femto', {}),
)


def describe(name: str, kwargs: Dict[str, Any], img_size: int) -> str:
    """Create, train a step, and return the row of the table."""
    torch.manual_seed(0)
    if 'patch14' in name:
        img_size = -(-img_size // 14) * 14
    model = create_segmentation_model(name, 21, img_size=(img_size, img_size), **kwargs)
    task = SegmentationTask(model, verbose=False)
    task.get_trainable_module().train()
    result = task(torch.randn(2, 3, img_size, img_size), torch.randint(21, (2, img_size, img_size)))
    result['loss'].backward()
    trained = {k: p for k, p in task.get_trainable_module().named_parameters() if p.requires_grad}
    wrong = [k for k, p in trained.items() if p.grad is None or not p.grad.isfinite().all()]
    if wrong:
        raise SystemExit(f'{name}: no gradient, or none that is finite, for {wrong}')
    maps = ', '.join(f'1/{r}' for r in model.maps.reductions)
    backbone = sum(p.numel() for p in model.backbone.parameters()) / 1e6
    unused = sum(p.numel() for p in model.backbone.parameters() if not p.requires_grad) / 1e6
    head = sum(p.numel() for p in [*model.decoder.parameters(), *model.classifier.parameters()]) / 1e6
    options = ''.join(f', {k}={v}' for k, v in kwargs.items() if k != 'head')
    sizes = f'{backbone:.1f} | {unused:.1f} | {head:.1f}'
    return f'| {name}{options} | {model.head} | {maps} | {model.num_features} | {sizes} |'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--img-size', type=int, default=128, metavar='N', help='size of the images (default: 128)')
    args = parser.parse_args()
    print('| backbone | head | maps | features | backbone, M | of these unused | head, M |')
    print('|---|---|---|---|---|---|---|')
    for name, kwargs in _BACKBONES:
        try:
            print(describe(name, kwargs, args.img_size), flush=True)
        except ValueError as e:
            print(f'{name}: {e}', file=sys.stderr)
    print(f'\n{args.img_size} px (the next multiple of 14 for patches of 14), 21 classes.')


if __name__ == '__main__':
    main()
