"""Low-rank adapters in models of timm"""

import copy
import json
import sys
from importlib.util import find_spec

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
from runs import outcome, results_of, rows_of, stop_at, train
from timm.optim import create_optimizer_v2

from timm_coretune import CoreTuningTask, create_segmentation_model, load_checkpoint, load_segmentation_model
from timm_coretune.export import export_model
from timm_coretune.lora import add_lora, plain_state_dict
from timm_coretune.segmentation import SegmentationTask, export_segmentation_model

pytestmark = pytest.mark.skipif(find_spec('peft') is None, reason='needs peft')  # which takes long to import

SIZE = (3, 64, 64)
# name, arguments, kind of the layers, their number
MODELS = {
    'test_vit': ({'img_size': 64}, 'Linear', 6 * 4),
    'vit_small_patch16_dinov3': ({'depth': 2, 'embed_dim': 64, 'num_heads': 2}, 'Linear', 2 * 4),
    'vit_small_patch16_dinov3_qkvb': ({'depth': 2, 'embed_dim': 64, 'num_heads': 2}, 'Linear', 2 * 4),
    'test_convnext': ({}, 'Linear', None),
    'test_resnet': ({}, 'Conv2d', None),
}


def create(name, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **{**MODELS[name][0], **kwargs})
    for key, p in model.named_parameters():
        if 'gamma' in key:
            p.data.fill_(0.5)  # the scale of a fresh block is so small that its output does not matter
    nn.init.normal_(model.get_classifier().weight)
    return model


def adapt(model, rank=2, alpha=6.0):
    """Adapters that are not those of a fresh model, whose B is zero."""
    counts = add_lora(model, rank, alpha, SIZE)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if 'lora_B' in name:
                p.normal_()
    return counts


@pytest.mark.parametrize('name', MODELS)
def test_adapters_and_classifier_train_and_become_a_plain_model(name):
    plain, (_, kind, num_layers) = create(name).eval(), MODELS[name]
    model, images = copy.deepcopy(plain), torch.randn(2, *SIZE)
    counts = add_lora(model, 2, 6.0, SIZE)
    torch.testing.assert_close(model(images), plain(images), rtol=1e-5, atol=1e-6)  # B is zero
    adapted = [key for key, module in model.named_modules() if hasattr(module, 'base_layer')]
    assert counts.num_layers == len(adapted) == (num_layers or len(adapted)) > 0
    assert counts.kind == kind
    for key, p in model.named_parameters():
        if 'lora_B' in key:
            nn.init.normal_(p)
    task = CoreTuningTask(model, verbose=False).train()
    task(images, torch.tensor([0, 1]))['loss'].backward()
    classifier = {id(p) for p in model.get_classifier().parameters()}
    for key, p in model.named_parameters():
        assert p.requires_grad == (p.grad is not None) == ('lora_' in key or id(p) in classifier), key
    assert counts.num_trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counts.num_parameters - counts.num_trained < sum(p.numel() for p in plain.parameters())
    state = plain_state_dict(model)
    assert list(state) == list(plain.state_dict())
    with torch.no_grad():
        expected, before = model.eval()(images), plain(images)
        plain.load_state_dict(state, strict=True)
        torch.testing.assert_close(plain(images), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, expected, atol=1e-2)


def test_a_merged_weight_is_that_of_the_formula():
    plain = create('test_vit')
    model = copy.deepcopy(plain)
    adapt(model, rank=2, alpha=6.0)
    layer = model.blocks[1].attn.qkv
    down, up = layer.lora_A['default'].weight, layer.lora_B['default'].weight
    expected = plain.blocks[1].attn.qkv.weight + 6.0 / 2 * up @ down
    torch.testing.assert_close(plain_state_dict(model)['blocks.1.attn.qkv.weight'], expected)
    assert 'blocks.1.attn.qkv.base_layer.weight' in model.state_dict()  # it stays as it is


def test_a_model_without_adapters_is_plain_already():
    model = create('test_resnet')
    assert all(
        value is not None and torch.equal(value, model.state_dict()[k]) for k, value in plain_state_dict(model).items()
    )


def test_exported_models_are_plain(tmp_path):
    model, images = create('test_vit').eval(), torch.randn(1, *SIZE)
    adapt(model)
    export_model(model, str(tmp_path / 'images'))
    loaded = timm.create_model(f'local-dir:{tmp_path / "images"}', pretrained=True).eval()
    torch.testing.assert_close(loaded(images), model(images), rtol=1e-4, atol=1e-4)
    pixels = create_segmentation_model('test_vit', 4, 'eomt', SIZE[1:]).eval()
    adapt(pixels)
    export_segmentation_model(pixels, str(tmp_path / 'pixels'))
    found = load_segmentation_model(tmp_path / 'pixels')(images)
    torch.testing.assert_close(found, pixels(images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('head', ['linear', 'eomt'])
def test_the_head_of_a_segmentation_model_trains_whole(head):
    model = create_segmentation_model('test_vit', 4, head, SIZE[1:])
    add_lora(model, 2, img_size=SIZE)
    SegmentationTask(model, verbose=False).train()(torch.randn(2, *SIZE), torch.randint(4, (2, 64, 64)))[
        'loss'
    ].backward()
    for key, p in model.named_parameters():
        assert p.requires_grad == (p.grad is not None) == ('lora_' in key or not key.startswith('backbone.')), key


def test_layer_decay_gives_adapters_the_rate_of_their_block():
    model = create('test_vit')
    add_lora(model, 2, img_size=SIZE)
    module = CoreTuningTask(model, verbose=False).get_trainable_module()
    optimizer = create_optimizer_v2(module, opt='sgd', lr=0.1, layer_decay=0.5)
    names = {id(p): name for name, p in module.named_parameters()}
    scale = {names[id(p)]: group['lr_scale'] for group in optimizer.param_groups for p in group['params']}
    assert set(scale) == {name for name, p in module.named_parameters() if p.requires_grad}
    blocks = [scale[f'model.blocks.{i}.attn.qkv.lora_A.default.weight'] for i in range(6)]
    assert [b / a for a, b in zip(blocks, blocks[1:], strict=False)] == [2.0] * 5


def test_a_state_with_adapters_is_not_taken_for_a_plain_one(tmp_path):
    model = create('test_vit')
    adapt(model)
    torch.save(model.state_dict(), tmp_path / 'state.pth')
    with pytest.raises(ValueError, match='got a network with low-rank adapters .*model_best.safetensors'):
        load_checkpoint(create('test_vit'), tmp_path / 'state.pth')


@pytest.mark.slow
@pytest.mark.parametrize('wrap', ['compile', 'ddp'])
def test_a_wrapped_step_has_the_same_gradients(wrap):
    images, target = torch.randn(4, *SIZE), torch.tensor([0, 1, 0, 1])
    model = create('test_vit', depth=1)
    adapt(model)
    tasks = []
    for _ in range(2):
        torch.manual_seed(1)
        generator = torch.Generator().manual_seed(0)
        tasks.append(CoreTuningTask(copy.deepcopy(model), generator=generator, verbose=False).train())
    plain, wrapped = tasks
    plain(images, target)['loss'].backward()
    if wrap == 'compile':
        wrapped.compile(backend='eager', fullgraph=True)
        wrapped(images, target)['loss'].backward()
    else:
        dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
        try:
            wrapped.prepare_distributed(find_unused_parameters=False)(images, target)['loss'].backward()
        finally:
            dist.destroy_process_group()
    found = [p.grad for p in wrapped.trainable_module.parameters()]
    for gradient, p in zip(found, plain.trainable_module.parameters(), strict=True):
        assert (gradient is None) == (p.grad is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, p.grad, rtol=1e-3, atol=1e-5)


class ReadsWeights(nn.Module):
    """A network that uses one layer without calling it, and has one that it does not use."""

    num_classes = 0

    def __init__(self):
        super().__init__()
        self.called, self.read, self.idle = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return nn.functional.linear(self.called(x.mean((2, 3))), self.read.weight)


def test_layers_that_are_not_called_get_no_adapter():
    model = ReadsWeights()
    assert add_lora(model, 2, img_size=SIZE)[:2] == (1, 'Linear')
    assert hasattr(model.called, 'base_layer')


@pytest.mark.parametrize(
    ('model', 'arguments', 'told'),
    [
        (lambda: create('test_vit'), (0,), 'rank >= 1 and alpha > 0 of LoRA, got 0'),
        (lambda: create('test_vit'), (2, 0.0), 'got 2 and 0'),
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 1, groups=3)), (2, None, SIZE), 'linear layers, or convolutions'),
    ],
    ids=['rank', 'alpha', 'no layer'],
)
def test_what_cannot_have_adapters_is_refused(model, arguments, told):
    with pytest.raises(ValueError, match=told):
        add_lora(model(), *arguments)


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, 'peft', None)
    with pytest.raises(ImportError, match=r'timm-coretune\[peft\]'):
        add_lora(create('test_vit'), 2)


# Runs

FLAGS = (
    *('--coretune', '--model', 'test_vit', '--img-size', '32', '--lora-rank', '2', '--opt', 'adamw'),
    *('--model-ema', '--model-ema-decay', '0.5', '--recovery-interval', '1'),
)


@pytest.fixture(scope='module')
def data(tiny_images):
    """24 training and 12 validation images of 3 classes."""
    return tiny_images((8, 8, 8), (4, 4, 4), names=['red', 'green', 'blue'], noise=60, tint=180)


@pytest.fixture(scope='module')
def tuned(data, tmp_path_factory):
    """The folder of a run with adapters."""
    return train(data, tmp_path_factory.mktemp('lora'), *FLAGS)


@pytest.mark.slow
def test_a_run_leaves_a_plain_model_and_a_state_with_adapters(data, tuned, tmp_path):
    state = torch.load(tuned / 'last.pth.tar', weights_only=False)
    assert any('lora_A' in key for key in state['state_dict'])
    model = timm.create_model(f'local-dir:{tuned}', pretrained=True)
    config = json.loads((tuned / 'config.json').read_text())
    assert config['architecture'] == 'test_vit'
    assert not any('lora' in key for key in model.state_dict())
    scores = [float(row['eval_loss']) for row in rows_of(tuned / 'summary.csv')]
    flags = ('--eval-only', '--initial-checkpoint', tuned / 'model_best.safetensors', '--model', 'test_vit')
    (result,) = results_of(data, tmp_path, *flags, '--img-size', '32')
    assert min(abs(result['validation']['loss'] - score) for score in scores) < 1e-4


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits(data, tuned, tmp_path, monkeypatch, messages):
    with monkeypatch.context() as context:
        stop_at(context, '_step', 4)
        train(data, tmp_path, *FLAGS)
    (line,) = [line for line in messages() if line.startswith('LoRA of rank')]
    # a layer of D to E features has 2 (D + E) parameters: qkv, proj, fc1 and fc2 of 6 blocks; then the classifier
    num_trained = 6 * 2 * ((64 + 192) + (64 + 64) + 2 * (64 + 192)) + 65 * 3
    assert line.startswith(f'LoRA of rank 2 in 24 Linear layers: {num_trained:,} of ')
    folder = train(data, tmp_path, *FLAGS, '--resume', 'auto')
    assert outcome(folder) == outcome(tuned)
    assert len(rows_of(folder / 'summary.csv')) == 2
