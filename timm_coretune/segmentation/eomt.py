"""EoMT: learned queries among the tokens of a plain vision transformer, each of which predicts a class and a mask

Paper: `Your ViT is Secretly an Image Segmentation Model`
    - Tommie Kerssies et al., CVPR 2025, https://arxiv.org/abs/2503.19108
Written from the paper. Left out of it: the mask loss with its matching of queries to masks, and masked attention. The
queries are trained by the cross-entropy of the pixels, as all heads here. docs/segmentation.md says why.
"""

import math
from typing import Any, Dict, List, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import LayerNorm2d, PatchDropout
from timm.models import checkpoint
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

NUM_QUERIES = 100


def check_plain_transformer(backbone: nn.Module) -> None:
    """Raise a ValueError unless queries can be appended to the tokens of a backbone."""
    if not isinstance(backbone, (VisionTransformer, Eva)):
        raise ValueError(
            "Expected a VisionTransformer or Eva of timm for the head 'eomt', which puts queries among the tokens of a "
            f'plain transformer, got {type(backbone).__name__}. Use a ViT, DINOv2, DINOv3, DeiT or EVA model, or '
            'another head.'
        )
    if isinstance(backbone.patch_drop, PatchDropout):
        raise ValueError("Expected a transformer with all patches for the head 'eomt', got one with patch dropout.")


def _pad_rotations(rope: torch.Tensor, num_queries: int) -> torch.Tensor:
    """Rotary embeddings (..., N, sine and cosine) for N patches, followed by queries that are not rotated."""
    sine, cosine = rope.new_zeros(()), rope.new_ones(())
    width = rope.shape[-1] // 2
    still = torch.cat([sine.expand(width), cosine.expand(width)])
    return torch.cat([rope, still.expand(*rope.shape[:-2], num_queries, 2 * width)], dim=-2)


def append_queries(backbone: nn.Module, x: torch.Tensor, queries: torch.Tensor, num_blocks: int) -> List[torch.Tensor]:
    """Run a plain transformer, whose last blocks see the queries too.

    Args:
        backbone: A VisionTransformer or Eva of timm.
        x: Images (B, 3, H, W).
        queries: Learned tokens (Q, D).
        num_blocks: Number of last blocks that see the queries.

    Returns:
        The map of patches (B, D, h, w), and the queries (B, Q, D), both after the last norm of the backbone.
    """
    vit = cast(Any, backbone)  # attributes of timm's that nn.Module does not declare
    size = vit.patch_embed.dynamic_feat_size(x.shape[2:])
    x, rope = vit.patch_embed(x), None
    if isinstance(backbone, Eva):
        x, rope = vit._pos_embed(x)
    else:
        x = vit._pos_embed(x)
    x = vit.norm_pre(x)
    has_rope_per_block = rope is not None and getattr(vit, 'rope_mixed', False)
    num_tokens, first = x.shape[1], len(vit.blocks) - num_blocks
    for i, block in enumerate(vit.blocks):
        if i == first:
            x = torch.cat([x, queries.to(x.dtype).expand(len(x), -1, -1)], dim=1)
        options: Dict[str, Any] = {}
        if rope is not None:
            own = rope[i] if has_rope_per_block else rope
            options['rope'] = _pad_rotations(own, len(queries)) if i >= first else own
        x = checkpoint(block, x, **options) if vit.grad_checkpointing else block(x, **options)
    x = vit.norm(x)
    patches = x[:, vit.num_prefix_tokens : num_tokens].transpose(1, 2)
    return [patches.reshape(len(x), -1, *size), x[:, num_tokens:]]


class MaskDecoder(nn.Sequential):
    """Upscales the map of patches to features of pixels, and holds the queries that the backbone gets.

    Args:
        width: Width D of the tokens.
        patch_size: Side of a patch. Maps of patches of 16 are upscaled to 1/4 of the image.
        depth: Number of blocks of the backbone. As in the paper's models, the last 3 of 12 blocks see the queries, 4 of
            24, and 5 of 40.
    """

    def __init__(self, width: int, patch_size: int, depth: int):
        layers: List[nn.Module] = []
        for _ in range(max(1, int(math.log2(patch_size)) - 2)):
            depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
            layers += [nn.ConvTranspose2d(width, width, 2, stride=2), nn.GELU(), depthwise, LayerNorm2d(width)]
        super().__init__(*layers)
        self.queries = nn.Parameter(torch.randn(NUM_QUERIES, width))
        self.num_blocks = min(depth, 3 if depth <= 12 else 4 if depth <= 24 else 5)

    def forward(self, maps: List[torch.Tensor]) -> torch.Tensor:
        return super().forward(maps[0])


class MaskClassifier(nn.Module):
    """Class scores of pixels: what each query says of its class, weighted by whether its mask covers the pixel.

    The score of class c at pixel p is log sum_q softmax(class logits of q)_c * sigmoid(mask logit of q at p), up to a
    constant of the pixel that no softmax over the classes sees. Each query has one further class, 'none of them'.

    Args:
        width: Width D of queries and features.
        num_classes: Number of classes C.
    """

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        self.in_channels, self.out_channels = width, num_classes
        self.class_head = nn.Linear(width, num_classes + 1)
        self.mask_head = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)
        )

    def forward(self, features: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """
        Args:
            features: Features of pixels (B, D, h, w).
            queries: Queries after the backbone (B, Q, D).

        Returns:
            Scores (B, C, h, w), of float32 or better.
        """
        class_logits = self.class_head(queries)
        mask_logits = torch.einsum('bqd,bdhw->bqhw', self.mask_head(queries), features)
        dtype = torch.promote_types(mask_logits.dtype, torch.float32)
        with torch.autocast(features.device.type, enabled=False):  # a score is the logarithm of a sum
            share = class_logits.to(dtype).softmax(dim=-1)[..., :-1]
            log_mask = F.logsigmoid(mask_logits.to(dtype))
            mask = (log_mask - log_mask.amax(dim=1, keepdim=True)).exp()  # a query has 1: no sum underflows
            return torch.einsum('bqc,bqhw->bchw', share, mask).clamp(min=torch.finfo(dtype).tiny).log()
