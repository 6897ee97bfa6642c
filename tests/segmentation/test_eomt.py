"""Queries among the tokens of a plain transformer, and the scores that they give pixels"""

import copy
import math

import pytest
import timm
import torch
from segmentation_models import NUM_CLASSES, create

from timm_coretune.segmentation import SegmentationTask
from timm_coretune.segmentation.eomt import MaskClassifier, MaskDecoder, append_queries

# name and arguments, name of the argument for register tokens, and how many the model has by itself
FAMILIES = {
    'vit': ('test_vit', {}, 'reg_tokens', 0),
    'dinov2': ('vit_tiny_patch16_224', {'reg_tokens': 4, 'no_embed_class': True, 'init_values': 0.1}, 'reg_tokens', 4),
    'dinov3': ('vit_small_patch16_dinov3', {'embed_dim': 64, 'num_heads': 2}, 'num_reg_tokens', 4),
    'mixed rope': ('vit_small_patch16_rope_mixed_224', {'embed_dim': 64, 'num_heads': 2}, 'num_reg_tokens', 0),
    'eva02': ('eva02_tiny_patch14_224', {'embed_dim': 96}, 'num_reg_tokens', 0),
}


def create_backbone(name, depth, **kwargs):
    torch.manual_seed(0)
    size = 56 if 'patch14' in name else 64
    backbone = timm.create_model(name, num_classes=0, img_size=size, depth=depth, **kwargs).double().eval()
    for key, p in backbone.named_parameters():
        if 'gamma' in key:
            p.data.fill_(0.5)  # the scale of a fresh block is so small that its output does not matter
    return backbone, size


@pytest.mark.parametrize('family', FAMILIES)
def test_queries_that_all_blocks_see_are_register_tokens_of_timm(family):
    name, kwargs, argument, own = FAMILIES[family]
    no_embed = {'no_embed_class': True}  # as queries have no position either
    backbone, size = create_backbone(name, 2, **{**kwargs, **no_embed})
    queries = torch.randn(5, backbone.embed_dim, dtype=torch.float64)
    with_registers, _ = create_backbone(name, 2, **{**kwargs, **no_embed, argument: own + 5})
    state = backbone.state_dict()
    registers = [state['reg_token']] if own else []
    state['reg_token'] = torch.cat([*registers, queries[None]], dim=1)
    with_registers.load_state_dict(state)
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    tokens = with_registers.forward_features(images)
    first, last = backbone.num_prefix_tokens, backbone.num_prefix_tokens + 5
    patches, found = append_queries(backbone, images, queries, 2)
    torch.testing.assert_close(found, tokens[:, first:last])
    torch.testing.assert_close(patches.flatten(2).transpose(1, 2), tokens[:, last:])
    assert patches.shape[2:] == (4, 4)


@pytest.mark.parametrize('family', ['vit', 'dinov3'])
def test_only_the_last_blocks_see_queries(family):
    name, kwargs, *_ = FAMILIES[family]
    backbone, size = create_backbone(name, 4, **kwargs)
    seen = []
    for block in backbone.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append(output))
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    backbone.forward_features(images)
    append_queries(backbone, images, torch.randn(5, backbone.embed_dim, dtype=torch.float64), 3)
    alone, among = seen[:4], seen[4:]
    assert [x.shape[1] for x in among] == [alone[0].shape[1] + extra for extra in (0, 5, 5, 5)]
    torch.testing.assert_close(among[0], alone[0])
    assert not torch.allclose(among[1][:, :-5], alone[1])


def scores_by_loops(classifier, features, queries):
    """Scores of one image, of which a constant of each pixel is left open."""
    share = classifier.class_head(queries).tolist()
    embedding = classifier.mask_head(queries).tolist()
    scores = []
    for pixel in features.flatten(1).T.tolist():
        of_classes = [0.0] * NUM_CLASSES
        for logits, weights in zip(share, embedding, strict=True):
            mask = 1 / (1 + math.exp(-sum(a * b for a, b in zip(weights, pixel, strict=True))))
            total = sum(math.exp(x) for x in logits)
            for c in range(NUM_CLASSES):
                of_classes[c] += math.exp(logits[c]) / total * mask
        scores.append([math.log(x) for x in of_classes])
    return torch.tensor(scores, dtype=torch.float64)


def test_the_score_of_a_class_is_the_sum_over_queries_of_class_times_mask():
    torch.manual_seed(0)
    classifier = MaskClassifier(6, NUM_CLASSES).double()
    for p in classifier.parameters():
        p.data.mul_(4)
    features, queries = torch.randn(2, 6, 2, 3, dtype=torch.float64), torch.randn(2, 5, 6, dtype=torch.float64)
    scores = classifier(features, queries)
    for one, f, q in zip(scores, features, queries, strict=True):
        expected = scores_by_loops(classifier, f, q).log_softmax(dim=1)
        torch.testing.assert_close(one.flatten(1).T.log_softmax(dim=1), expected)


def test_pixels_that_no_mask_covers_have_scores_and_a_gradient():
    classifier = MaskClassifier(6, NUM_CLASSES)
    features = torch.full((1, 6, 1, 1), -1e4).requires_grad_()
    for part in (classifier.mask_head[-1], classifier.mask_head[-3], classifier.mask_head[-5]):
        torch.nn.init.ones_(part.weight)
    scores = classifier(features, torch.ones(1, 5, 6))
    scores.log_softmax(dim=1)[0, 0].sum().backward()
    assert scores.isfinite().all()
    assert features.grad.isfinite().all()


@pytest.mark.parametrize(('depth', 'expected'), [(1, 1), (2, 2), (12, 3), (24, 4), (40, 5)])
def test_the_blocks_that_see_queries_are_those_of_the_paper(depth, expected):
    assert MaskDecoder(8, 16, depth).num_blocks == expected


@pytest.mark.parametrize(('patch', 'factor'), [(8, 2), (14, 2), (16, 4), (32, 8)])
def test_patches_are_upscaled_towards_a_quarter_of_the_image(patch, factor):
    assert MaskDecoder(8, patch, 2)([torch.randn(1, 8, 3, 5)]).shape == (1, 8, 3 * factor, 5 * factor)


@pytest.mark.parametrize(
    ('family', 'checkpointing'), [*((family, False) for family in FAMILIES), ('vit', True), ('dinov3', True)]
)
def test_every_parameter_that_trains_gets_a_gradient(family, checkpointing):
    name, kwargs, *_ = FAMILIES[family]
    plain, size = create_backbone(name, 2, **kwargs)
    model = create(copy.deepcopy(plain), 'eomt', img_size=(size, size)).double()
    assert list(model.backbone.state_dict()) == list(plain.state_dict())
    model.set_grad_checkpointing(checkpointing)
    task = SegmentationTask(model, dtype=torch.float64, verbose=False).train()
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    result = task(images, torch.randint(NUM_CLASSES, (2, size, size)))
    result['loss'].backward()
    trained = {n: p for n, p in task.trainable_module.named_parameters() if p.requires_grad}
    assert [n for n, p in trained.items() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()] == []
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if 'fc_norm' in n}


def test_images_of_another_size_than_that_of_the_training_are_taken():
    model = create('vit_small_patch16_dinov3', 'eomt', embed_dim=64, num_heads=2, depth=2).eval()
    features, logits, output = model.forward_pixels(torch.randn(1, 3, 70, 90))  # padded to 80 x 96
    assert features.shape == (1, 64, 20, 24)
    assert logits.shape == (1, NUM_CLASSES, 20, 24)
    assert output.shape == (1, NUM_CLASSES, 70, 90)
