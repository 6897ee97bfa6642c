#!/usr/bin/env python3
"""Core-tune, or plainly fine-tune, a pretrained timm model on one CPU or many GPUs

accelerate launch train.py --coretune
accelerate launch train.py --coretune --data-dir DIR --model resnet50 --pretrained-path moco_v2.pth.tar
"""

from timm_coretune.train import main

if __name__ == '__main__':
    main()
