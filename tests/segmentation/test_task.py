"""SegmentationTask: losses against loops over pixels and anchors, state, freezing, optimizer, several processes"""

import copy
import math

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
from ranks import launch_ranks
from reference import layer_of
from segmentation_reference import IGNORED, Draws, Pixels, pixel_objective
from segmentation_task_worker import SCENARIOS, WORLD_SIZE, all_images, make_task, step
from timm.optim import create_optimizer_v2

from timm_coretune import CoreTuningLoss
from timm_coretune.distributed import GlobalBatch
from timm_coretune.loss import focal_supcon
from timm_coretune.loss.parts import score_blocks
from timm_coretune.mining import hardest
from timm_coretune.mixup import MixupDraws
from timm_coretune.segmentation import SegmentationModel, SegmentationTask, create_segmentation_model
from timm_coretune.segmentation.dense import check_masks
from timm_coretune.timm_model import get_classifiers
from timm_coretune.train.freezing import BackboneFreezer, head_parameters

NUM_CLASSES = 5

A = 6  # anchors of an image


def blobs(seed, batch_size, size):
    """Masks of blocks of classes with ignored pixels among them, and images in the colours of their classes."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(NUM_CLASSES, (batch_size, 1, 5, 6), generator=generator).float()
    target = nn.functional.interpolate(coarse, size, mode='nearest')[:, 0].long()
    target[torch.rand(target.shape, generator=generator) < 0.15] = IGNORED
    colours = torch.randn(256, 3, dtype=torch.float64, generator=generator)
    noise = torch.randn(batch_size, 3, *size, dtype=torch.float64, generator=generator)
    return colours[target].permute(0, 3, 1, 2) + noise, target


def create_task(head='fcn', mixup_enabled=True, dtype=torch.float64, backbone='test_resnet', **kwargs):
    torch.manual_seed(0)
    backbone_kwargs = {'output_stride': 8} if backbone == 'test_resnet' else {}
    model = create_segmentation_model(backbone, NUM_CLASSES, head, img_size=(32, 32), **backbone_kwargs)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    kwargs = {'contrast_weight': 0.7, 'temperature': 0.2, 'projection_dim': 8, 'anchors_per_image': A, **kwargs}
    task = SegmentationTask(
        model.to(dtype), dtype=dtype, verbose=False, generator=torch.Generator().manual_seed(1), **kwargs
    )
    task.criterion.mixup.mixup_enabled = mixup_enabled
    return task.train()


def draw(task, batch_size):
    """Random numbers of the next step, as loops take them, without a trace in the task."""
    generator = task.criterion.mixup.generator
    state = generator.get_state()
    size = batch_size * task.anchors_per_image
    draws = task.criterion.mixup.draw(size) if task.criterion.mixup.mixup_enabled else [torch.zeros(size)] * 4
    seed = torch.randint(2**32, (batch_size,), generator=generator)
    generator.set_state(state)
    return Draws(seed, *draws)


def losses_by_loops(task, images, target, draws):
    """The losses of a step, of what the model makes of the images."""
    model, criterion = task.trainable_module.model, task.criterion
    with torch.no_grad():
        features, logits, output = model.forward_pixels(images)
    multiple = model.maps.reductions[-1]
    height, width = (math.ceil(size / multiple) * multiple for size in images.shape[2:])
    padded = torch.full((len(target), height, width), IGNORED)
    padded[:, : target.shape[1], : target.shape[2]] = target
    classifier = None
    if isinstance(model.classifier, nn.Conv2d):
        classifier = (model.classifier.weight.detach().flatten(1).numpy(), model.classifier.bias.detach().numpy())
    return pixel_objective(
        Pixels(features, logits, output, padded),
        target,
        classifier,
        criterion.projector and (layer_of(criterion.projector.fc1), layer_of(criterion.projector.fc2)),
        draws,
        task.anchors_per_image,
        mixup_enabled=criterion.mixup.mixup_enabled,
        contrast_weight=criterion.contrast_weight,
        temperature=criterion.contrast.temperature,
        label_smoothing=criterion.label_smoothing,
        smooth=criterion.smooth,
        smooth_weight=criterion.smooth_weight,
    )


def scalars(result):
    return {name: value.item() for name, value in result.items() if value.ndim == 0}


# The losses of a step

CASES = {
    'as published': {'smooth': 'both'},
    'by default': {},
    'no contrast': {'contrast_weight': 0.0},
    'no mixtures': {'mixup_enabled': False},
    'neither': {'contrast_weight': 0.0, 'mixup_enabled': False},
    'label smoothing': {'label_smoothing': 0.1},
    'one anchor': {'anchors_per_image': 1},
    'more anchors than pixels': {'anchors_per_image': 20},
    'deeplabv3': {'head': 'deeplabv3'},
    'fpn': {'head': 'fpn'},
    'vit': {'backbone': 'test_vit'},
    'linear': {'head': 'linear'},
    'linear, vit': {'head': 'linear', 'backbone': 'test_vit', 'smooth': 'both'},
    'eomt': {'head': 'eomt', 'backbone': 'test_vit', 'smooth': 'both'},
}

BATCHES = {
    'three images': lambda: blobs(2, 3, (32, 32)),
    'one image': lambda: blobs(3, 1, (32, 32)),
    'odd size': lambda: blobs(4, 2, (33, 47)),
    'an ignored image': lambda: ignoring(1, *blobs(2, 3, (32, 32))),
    'all ignored': lambda: ignoring(slice(None), *blobs(2, 2, (32, 32))),
    'one class': lambda: of_one_class(*blobs(2, 2, (32, 32))),
    'one class in each image': lambda: of_one_class(*blobs(2, 3, (32, 32)), labels=(1, 4, 1)),
}


def ignoring(index, images, target):
    target[index] = IGNORED
    return images, target


def of_one_class(images, target, labels=(2, 2, 2)):
    for row, label in zip(target, labels, strict=False):
        row[row != IGNORED] = label
    return images, target


def check_losses(task, images, target):
    draws = draw(task, len(images))
    expected = losses_by_loops(copy.deepcopy(task), images, target, draws)
    result = task(images, target)
    assert scalars(result) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert set(result) == set(expected)  # no logits, of which there is a row for each pixel
    return result


@pytest.mark.parametrize('case', CASES)
def test_losses_are_those_of_loops_over_pixels_and_anchors(case):
    check_losses(create_task(**CASES[case]), *BATCHES['three images']())


def test_many_anchors_are_mined_and_contrasted_block_by_block(monkeypatch):
    monkeypatch.setattr(focal_supcon, 'DENSE_BELOW', 1)
    monkeypatch.setattr(score_blocks, 'CPU_BLOCK', 50)
    monkeypatch.setattr(hardest, 'BLOCK', 50)
    check_losses(create_task(**CASES['as published']), *BATCHES['odd size']())


@pytest.mark.parametrize('batch', [name for name in BATCHES if name != 'three images'])
@pytest.mark.parametrize('head', ['fcn', 'deeplabv3'])
def test_losses_of_every_batch_are_those_of_loops(batch, head):
    images, target = BATCHES[batch]()
    task = create_task(head)
    result = check_losses(task, images, target)
    result['loss'].backward()
    assert all(p.grad.isfinite().all() for p in task.trainable_module.parameters() if p.requires_grad)
    if batch == 'all ignored':
        assert scalars(result) == dict.fromkeys(['loss', 'task_loss', 'contrast_loss', 'dense_loss'], 0.0)
        assert all((p.grad == 0).all() for p in task.trainable_module.parameters() if p.requires_grad)


@pytest.mark.parametrize('contrast_weight', [0.7, 0.0])
def test_pixels_without_an_anchor_count_with_their_whole_cross_entropy(contrast_weight):
    images, target = blobs(2, 2, (32, 32))
    target[:] = IGNORED
    target[:, ::8, ::8] = torch.randint(NUM_CLASSES, (2, 4, 4))  # none is in the middle of a cell
    task = create_task(contrast_weight=contrast_weight)
    output = copy.deepcopy(task).get_eval_model()(images)
    result = check_losses(task, images, target)
    expected = nn.functional.cross_entropy(output, target, ignore_index=IGNORED)
    torch.testing.assert_close(result['task_loss'], expected, rtol=1e-12, atol=0)


def test_an_ignored_class_of_another_index_does_not_count_either():
    images, target = blobs(2, 2, (32, 32))
    expected = scalars(create_task()(images, target))
    target[target == IGNORED] = 100
    assert scalars(create_task(ignore_index=100)(images, target)) == expected


def test_consecutive_steps_draw_anew_and_steps_of_the_same_state_alike():
    images, target = blobs(2, 2, (32, 32))
    task = create_task()
    state = task.get_task_state()
    first, second = scalars(task(images, target)), scalars(task(images, target))
    assert first['dense_loss'] == second['dense_loss']
    assert first['contrast_loss'] != second['contrast_loss']
    task.load_task_state(state)
    assert scalars(task(images, target)) == first


@pytest.mark.parametrize('case', ['as published', 'fpn'])
def test_gradients_are_finite_differences_of_the_losses_of_loops(case):
    images, target = blobs(5, 2, (32, 32))
    task = create_task(**CASES[case])
    draws = draw(task, 2)
    task(images, target)['loss'].backward()
    reference = copy.deepcopy(task)
    parameters = dict(reference.trainable_module.named_parameters())
    trained = {name: p.grad for name, p in task.trainable_module.named_parameters() if p.requires_grad}
    names = ['model.classifier.weight', 'criterion.projector.fc1.weight', 'criterion.projector.fc2.bias']
    for part in ('model.backbone', 'model.decoder'):
        weights = [name for name in trained if name.startswith(part) and trained[name].ndim == 4]
        names += [weights[0], weights[-1]]
    for name in names:
        place = trained[name].abs().argmax()
        value = parameters[name].data.view(-1)
        loss = []
        for h in (1e-6, -1e-6):
            value[place] += h
            loss.append(losses_by_loops(reference, images, target, draws)['loss'])
            value[place] -= h
        numeric = (loss[0] - loss[1]) / 2e-6
        assert trained[name].view(-1)[place].item() == pytest.approx(numeric, rel=1e-4), name


@pytest.mark.parametrize('case', ['by default', 'linear', 'eomt'])
def test_a_step_in_bfloat16_autocast_is_finite_and_close_to_one_in_float32(case):
    images, target = blobs(2, 2, (32, 32))
    task = create_task(**CASES[case], dtype=torch.float32)
    precise = copy.deepcopy(task)(images.float(), target)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        result = task(images.float(), target)
    result['loss'].backward()
    assert result['loss'].dtype == torch.float32
    assert result['dense_loss'].item() == pytest.approx(precise['dense_loss'].item(), rel=0.03)
    assert all(p.grad.isfinite().all() for p in task.trainable_module.parameters() if p.requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize('case', ['deeplabv3', 'eomt'])
def test_a_compiled_step_is_one_graph_with_the_same_losses(case):
    images, target = blobs(2, 2, (33, 40) if case == 'deeplabv3' else (32, 32))
    task = create_task(**CASES[case])
    compiled = copy.deepcopy(task)
    compiled.criterion.mixup.generator.set_state(task.criterion.mixup.generator.get_state())
    compiled.trainable_module = torch.compile(compiled.trainable_module, backend='aot_eager', fullgraph=True)
    result, expected = compiled(images, target), task(images, target)
    assert scalars(result) == pytest.approx(scalars(expected), rel=1e-12)
    result['loss'].backward()
    expected['loss'].backward()
    eager = dict(task.trainable_module.named_parameters())
    for name, p in compiled.trainable_module._orig_mod.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, eager[name].grad, rtol=1e-9, atol=1e-12)


def test_evaluation_gives_logits_of_every_pixel_only():
    images, target = blobs(2, 2, (33, 47))
    task = create_task()
    task.trainable_module.eval()
    output = task.trainable_module(images)
    assert torch.equal(output, task.get_eval_model()(images))
    assert output.shape == (2, NUM_CLASSES, 33, 47)


# State, freezing, optimizer


def test_a_checkpoint_holds_the_plain_model_and_the_rest_of_the_task_apart():
    images, target = blobs(2, 2, (32, 32))
    task = create_task()
    task.setup_ema(decay=0.5)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1)
    for _ in range(2):
        task(images, target)['loss'].backward()
        optimizer.step()
        task.update_ema()
    states = {ema: copy.deepcopy(task.get_checkpoint_state(ema=ema)) for ema in (False, True)}
    plain = create_segmentation_model('test_resnet', NUM_CLASSES, 'fcn', (32, 32), output_stride=8)
    assert list(states[False]['state_dict']) == list(plain.state_dict())
    assert list(states[True]['state_dict_ema']) == list(plain.state_dict())
    assert set(states[False]['task_state']) == {'generator', 'projector'}
    assert isinstance(task.get_eval_model(), SegmentationModel)
    other = create_task()
    with torch.no_grad():
        for p in other.trainable_module.parameters():
            p.add_(1.0)
    other.setup_ema(decay=0.5)
    for ema, suffix in ((False, ''), (True, '_ema')):
        state = states[ema]
        other.load_checkpoint_state(state[f'state_dict{suffix}'], state[f'task_state{suffix}'], ema=ema)
        expected = task.get_trainable_module(ema=ema).state_dict()
        found = other.get_trainable_module(ema=ema).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert scalars(task(images, target)) == scalars(other(images, target))


@pytest.mark.parametrize('case', ['by default', 'vit', 'linear', 'eomt'])
def test_the_head_is_exactly_what_is_not_backbone(case):
    task = create_task(**CASES[case])
    module = task.trainable_module
    model = module.model
    assert get_classifiers(model) == [model.decoder, model.classifier]
    not_backbone = {name for name, _ in module.named_parameters() if not name.startswith('model.backbone.')}
    head = {id(p) for p in head_parameters(task)}
    assert {name for name, p in module.named_parameters() if id(p) in head} == not_backbone
    clipped = {id(p) for p in task.get_clip_parameters(exclude_head=True)}
    named = {name for name, p in module.named_parameters() if id(p) in clipped}
    assert named == {n for n, _ in module.named_parameters() if n.startswith(('model.backbone.', 'criterion.'))}


def test_a_frozen_backbone_stays_as_it_is_while_the_head_trains():
    images, target = blobs(2, 2, (32, 32))
    task = create_task('deeplabv3')
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1)
    freezer = BackboneFreezer(task, 1)
    assert freezer.start_epoch(0)
    task.trainable_module.train()
    freezer.after_train_mode()
    before = copy.deepcopy(task.trainable_module.state_dict())
    task(images, target)['loss'].backward()
    optimizer.step()
    changed = {
        name for name, value in task.trainable_module.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {name for name in before if not name.startswith('model.backbone.')}
    assert freezer.start_epoch(1)
    assert all(p.requires_grad for p in freezer.backbone)


def test_layer_decay_and_no_weight_decay_reach_the_backbone_by_its_names():
    task = create_task(backbone='test_vit')
    module = task.get_trainable_module()
    optimizer = create_optimizer_v2(module, opt='sgd', lr=0.1, weight_decay=0.05, layer_decay=0.5)
    names = {id(p): name for name, p in module.named_parameters()}
    scale, decay = {}, {}
    for group in optimizer.param_groups:
        for p in group['params']:
            scale[names[id(p)]], decay[names[id(p)]] = group['lr_scale'], group['weight_decay']
    assert set(scale) == {name for name, p in module.named_parameters() if p.requires_grad}
    head = [name for name in scale if not name.startswith('model.backbone.')]
    assert {scale[name] for name in head} == {1.0}
    # the layers that timm gives a classifier, whose head shares that of the last block
    classifier = timm.create_model('test_vit', num_classes=NUM_CLASSES)
    expected = create_optimizer_v2(classifier, opt='sgd', lr=0.1, weight_decay=0.05, layer_decay=0.5)
    names = {id(p): name for name, p in classifier.named_parameters()}
    expected = {names[id(p)]: group['lr_scale'] for group in expected.param_groups for p in group['params']}
    prefix = 'model.backbone.'
    assert {name: scale[prefix + name] for name in expected if prefix + name in scale} == {
        name: value for name, value in expected.items() if not name.startswith(('head.', 'fc_norm.'))
    }
    blocks = [scale[f'model.backbone.blocks.{i}.mlp.fc1.weight'] for i in range(len(module.model.backbone.blocks))]
    assert blocks == [0.5 ** (6 - i) for i in range(6)]
    # position embedding and class token are weights that timm wants no decay for
    unlike = [name for name in module.no_weight_decay() if name in scale]
    assert 'model.backbone.pos_embed' in unlike
    assert {decay[name] for name in unlike} == {0.0}
    assert decay['model.backbone.blocks.0.mlp.fc1.weight'] == decay['model.classifier.weight'] == 0.05


@pytest.mark.parametrize(
    ('target', 'told'),
    [
        (torch.zeros(2, 8, 9, dtype=torch.int64), r'int64 \(2, 8, 8\).*int64 \(2, 8, 9\)'),
        (torch.zeros(3, 8, 8, dtype=torch.int64), r'\(3, 8, 8\)'),
        (torch.zeros(2, 1, 8, 8, dtype=torch.int64), r'\(2, 1, 8, 8\)'),
        (torch.zeros(2, 8, 8, dtype=torch.uint8), r'uint8'),
        (torch.zeros(2, 8, 8), r'float32'),
        (torch.full((2, 8, 8), 5), r'\[0, 4\], or 255 .* got 5'),
        (torch.full((2, 8, 8), -1), r'got -1'),
        (torch.full((2, 8, 8), 256), r'got 256'),
    ],
    ids=['width', 'batch size', 'channel', 'uint8', 'float', 'class', 'negative', 'beyond'],
)
def test_masks_that_do_not_fit_are_refused(target, told):
    images = torch.zeros(2, 3, 8, 8)
    check_masks(torch.full((2, 8, 8), 4), images, 5, IGNORED)
    check_masks(torch.full((2, 8, 8), IGNORED), images, 5, IGNORED)
    with pytest.raises(ValueError, match=told):
        check_masks(target, images, 5, IGNORED)
    with pytest.raises(ValueError, match=told):
        create_task()(images.double(), target)


@pytest.mark.parametrize('kwargs', [{'anchors_per_image': 0}, {'contrast_weight': -1.0}], ids=str)
def test_arguments_out_of_range_are_refused(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        create_task(**kwargs)


def test_a_criterion_goes_without_its_arguments():
    model = create_segmentation_model('test_vit', 3, 'fcn', (32, 32))
    with pytest.raises(ValueError, match='temperature'):
        SegmentationTask(model, CoreTuningLoss(model.num_features), verbose=False, temperature=0.1)


# Several processes


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    """Function of a scenario's name: what each of the processes found in every update."""
    ranks = launch_ranks('segmentation_task_worker.py', WORLD_SIZE, tmp_path_factory.mktemp('ranks'))
    return lambda name: [rank[name] for rank in ranks]


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason='torch was built without gloo')
@pytest.mark.parametrize('name', SCENARIOS)
def test_two_processes_train_as_one_with_the_whole_batch(name, found):
    scenario, ranks = SCENARIOS[name], found(name)
    task = make_task(scenario)
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.05)
    world_size, most = len(scenario.sizes), max(scenario.sizes)
    owner = sorted((b, r) for r, size in enumerate(scenario.sizes) for b in range(size))
    rows = [sum(scenario.sizes[:r]) + b for b, r in owner]  # in the order of one process that reads the same data
    for update, (images, target) in enumerate(all_images(scenario)):
        # image b of process r takes the draws of image b * world_size + r, of as many as the largest batch needs
        drawn = draw(task, world_size * most)
        place = torch.tensor([b * world_size + r for b, r in owner])
        anchor = (place[:, None] * task.anchors_per_image + torch.arange(task.anchors_per_image)).flatten()
        batch = GlobalBatch(0, [len(anchor)], task.anchors_per_image)
        draws = MixupDraws(*(x[anchor] for x in drawn[1:])) if scenario.mixup_enabled else None
        num_pixels = (target != IGNORED).sum()
        arguments = (images[rows], target[rows], num_pixels, drawn.seed[place], batch, draws)
        expected = step(task.trainable_module, optimizer, *arguments)
        # what a step leaves of the generator
        if scenario.mixup_enabled:
            task.criterion.mixup.draw(world_size * most * task.anchors_per_image)
        torch.randint(2**32, (world_size * most,), generator=task.criterion.mixup.generator)
        for rank in ranks:
            found_gradients = rank[update]['gradients']
            assert found_gradients.keys() == expected['gradients'].keys()
            scale = max(g.abs().max() for g in expected['gradients'].values())
            for parameter, gradient in expected['gradients'].items():
                error = (found_gradients[parameter] - gradient).abs().max()
                assert error <= 1e-10 * scale, (update, parameter)
            assert torch.equal(rank[update]['generator'], task.criterion.mixup.generator.get_state())
        mean = {key: np.mean([rank[update]['losses'][key] for rank in ranks]) for key in expected['losses']}
        assert mean == pytest.approx(expected['losses'], rel=1e-10, abs=1e-12)


def test_nothing_of_a_task_stays_on_the_model():
    task = create_task(dtype=torch.float32)
    images, masks = blobs(0, 2, (32, 32))
    task(images.float(), masks)['loss'].backward()
    model = task.get_eval_model()
    kinds = ('_forward_pre_hooks', '_forward_hooks', '_backward_hooks', '_backward_pre_hooks')
    assert [name for name, part in model.named_modules() if any(getattr(part, kind) for kind in kinds)] == []


def test_the_evaluator_scores_pixels_and_leaves_out_the_ignored_ones():
    task = create_task(ignore_index=IGNORED)
    _, target = blobs(0, 2, (32, 32))
    output = nn.functional.one_hot(target.where(target != IGNORED, 0), NUM_CLASSES).movedim(-1, 1).float()
    evaluator = task.create_evaluator()
    evaluator.update(output, target)
    assert evaluator.compute()['miou'] == 100
