#!/usr/bin/env python3
"""How much memory does a step of a large network need, with adapters, recomputed activations and bfloat16?

    python benchmarks/step_memory.py

estimates the memory of Core-tuning with AdamW as train.py does before its first step, on tensors without memory, and
prints one Markdown table in MB. Nothing is trained, and the result is the same on every machine.
"""

import argparse
import contextlib
import functools
from typing import Any, Tuple

import timm
import torch

from timm_coretune import CoreTuningTask
from timm_coretune.lora import add_lora
from timm_coretune.train.run.memory import estimate

# flags, rank of the adapters, recomputed activations, bfloat16
_WAYS: Tuple[Tuple[str, int, bool, bool], ...] = (
    ('none', 0, False, False),
    ('`--lora-rank 8`', 8, False, False),
    ('`--grad-checkpointing`', 0, True, False),
    ('`--amp --amp-dtype bfloat16`', 0, False, True),
    ('all of them', 8, True, True),
)


def describe(name: str, batch_size: int, flags: str, rank: int, recomputes: bool, casts: bool) -> str:
    """The row of a network and flags."""
    model: Any = timm.create_model(name, num_classes=10)
    model.set_grad_checkpointing(recomputes)
    channels, height, width = model.pretrained_cfg['input_size']
    if rank:
        add_lora(model, rank)
    task = CoreTuningTask(model, verbose=False)
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad])
    autocast = functools.partial(torch.autocast, 'cpu', torch.bfloat16) if casts else contextlib.nullcontext
    memory = estimate(task, optimizer, (batch_size, channels, height, width), autocast)
    parts = (memory.parameters, memory.gradients, memory.optimizer or 0, memory.activations, memory.total())
    return f'| {name} | {flags} | {" | ".join(f"{part / 1e6:,.0f}" for part in parts)} |'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=['vit_base_patch16_224', 'resnet50'], metavar='NAME')
    parser.add_argument('--batch-size', type=int, default=64, metavar='N', help='images of a batch (default: 64)')
    args = parser.parse_args()
    print('| network | flags | parameters | gradients | optimizer | activations | together |')
    print('|---|---|---|---|---|---|---|')
    for name in args.models:
        for way in _WAYS:
            print(describe(name, args.batch_size, *way), flush=True)
    print(f'\n{args.batch_size} images of the size of the network, float32 unless --amp, AdamW, MB.')


if __name__ == '__main__':
    main()
