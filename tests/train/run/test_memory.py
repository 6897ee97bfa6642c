"""The memory of a step that is told before the first one, against what a step keeps"""

import copy
import sys

import pytest
import timm
import torch
from memory import CLEAR
from paths import HELPERS
from runs import results_of
from timm.optim import create_optimizer_v2

from timm_coretune import CoreTuningTask, create_segmentation_model
from timm_coretune.segmentation import SegmentationTask
from timm_coretune.train.cli.arguments import parse_args
from timm_coretune.train.run.memory import batch_shape, count_activations, estimate, log_memory

SIZES = {'test_vit': 160, 'test_resnet': 160, 'test_convnext': 160, 'test_efficientnet': 160}


def autocast(enabled=False):
    return lambda: torch.autocast('cpu', torch.bfloat16, enabled=enabled)


def kept_by(task, images, target, enabled=False):
    """Bytes that a step of a task keeps for its backward pass, without those of parameters and buffers."""
    own = {x.untyped_storage().data_ptr() for x in (*task.parameters(), *task.buffers())}
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), autocast(enabled)():
        task(images, target)
    return sum(x.untyped_storage().nbytes() for place, x in kept.items() if place not in own)


@pytest.mark.parametrize('amp', [False, True], ids=['float32', 'bfloat16'])
@pytest.mark.parametrize('name', SIZES)
def test_activations_are_those_that_a_step_keeps(name, amp):
    task = CoreTuningTask(timm.create_model(name, num_classes=5), verbose=False).train()
    shape = (8, 3, SIZES[name], SIZES[name])
    expected = kept_by(task, torch.randn(shape), torch.arange(8) % 5, amp)
    found = count_activations(task.get_eval_model(), shape, autocast(amp), torch.device('cpu'))
    assert found == pytest.approx(expected, rel=0.15)
    assert found <= expected  # the contrast keeps something too


def test_recomputed_activations_are_not_counted():
    model = timm.create_model('test_vit', num_classes=5)
    plain = count_activations(model, (8, 3, 160, 160), autocast(), torch.device('cpu'))
    model.set_grad_checkpointing()
    assert count_activations(model, (8, 3, 160, 160), autocast(), torch.device('cpu')) < 0.3 * plain


@pytest.mark.parametrize('head', ['linear', 'eomt'])
def test_pixels_are_counted(head):
    task = SegmentationTask(
        create_segmentation_model('test_vit', 7, head, (64, 64)), anchors_per_image=4, verbose=False
    ).train()
    expected = kept_by(task, torch.randn(8, 3, 64, 64), torch.randint(7, (8, 64, 64)))
    found = count_activations(task.get_eval_model(), (8, 3, 64, 64), autocast(), torch.device('cpu'))
    assert found == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize(('opt', 'slots'), [('sgd', 1), ('adamw', 2), ('lamb', 2), ('lion', 1), ('momentum', 1)])
def test_the_parts_are_those_of_tensors_and_nothing_is_changed(opt, slots):
    model = timm.create_model('test_vit', num_classes=5)
    model.patch_embed.requires_grad_(False)
    task = CoreTuningTask(model, verbose=False).train()
    task.setup_ema()
    module = task.get_trainable_module()
    optimizer = create_optimizer_v2(module, opt=opt, lr=0.1, momentum=0.9)
    before, random = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    memory = estimate(task, optimizer, (4, 3, 160, 160), autocast(), num_processes=2)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert not optimizer.state
    size = sum(p.numel() for p in module.parameters()) * 4
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad) * 4
    assert (memory.parameters, memory.average, memory.gradients) == (size, size, 2 * trained)
    assert memory.optimizer == pytest.approx(slots * trained, rel=1e-3)
    assert memory.total() == sum(memory[:5])
    task(torch.randn(4, 3, 160, 160), torch.tensor([0, 1, 0, 1]))['loss'].backward()
    optimizer.step()
    expected = sum(x.nbytes for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x))
    assert memory.optimizer == expected
    assert estimate(task, optimizer, (4, 3, 160, 160), autocast()).optimizer == expected  # as after a resume


def test_an_optimizer_that_reads_its_gradients_is_unknown_and_said_to_be(messages):
    class Reading(torch.optim.SGD):
        def step(self, closure=None):
            assert self.param_groups[0]['params'][0].grad.abs().max().item() >= 0

    task = CoreTuningTask(timm.create_model('vit_tiny_patch16_224', num_classes=5, depth=12), verbose=False)
    optimizer = Reading(task.get_trainable_module().parameters(), lr=0.1)
    log_memory(task, optimizer, (2, 3, 224, 224), autocast())
    (line,) = [line for line in messages() if line.startswith('Memory of a step')]
    assert ' + optimizer unknown + activations of 2 image(s) ' in line


PEAK = """
import sys, timm, torch
sys.path.insert(0, sys.argv[1])
from memory import peak_of
from timm_coretune import CoreTuningTask
torch.manual_seed(0)
task = CoreTuningTask(timm.create_model('vit_tiny_patch16_224', num_classes=5, depth=6), verbose=False).train()

def step(n):
    task(torch.randn(n, 3, 224, 224), torch.arange(n) % 5)['loss'].backward()

step(1)
print(peak_of(step, 24))
"""


@pytest.mark.slow
@pytest.mark.skipif(not CLEAR.exists(), reason='the peak of the memory is measured as Linux counts it')
def test_the_peak_of_a_step_is_that_of_its_activations(launch):
    measured = float(launch([sys.executable, '-c', PEAK, str(HELPERS)]).stdout) * 2**20
    model = timm.create_model('vit_tiny_patch16_224', num_classes=5, depth=6)
    found = count_activations(model, (24, 3, 224, 224), autocast(), torch.device('cpu'))
    assert found == pytest.approx(measured, rel=0.15)


@pytest.mark.slow
def test_a_run_of_a_large_network_tells_its_memory_and_that_of_a_small_one_does_not(tiny, tmp_path, messages):
    results_of(tiny, tmp_path / 'small', '--coretune', '--epochs', '1')
    assert not [line for line in messages() if line.startswith('Memory of a step')]
    results_of(tiny, tmp_path / 'large', '--coretune', '--epochs', '1', '--model', 'resnet18')
    (line,) = [line for line in messages() if line.startswith('Memory of a step')]
    parts = [
        float(part.rsplit(' ', 1)[1].replace(',', ''))
        for part in line.split(' = ')[1].split(' MB')[0].split('. ')[0].split(' + ')
    ]
    assert float(line.split(': ')[1].split(' MB')[0].replace(',', '')) == pytest.approx(sum(parts), abs=3)
    assert 'activations of 8 image(s)' in line


@pytest.mark.parametrize(
    ('flags', 'shape'),
    [
        ('-b 6', (6, 3, 40, 48)),
        ('-b 6 --aug-splits 3 --aa augmix-m5-w4-d2', (18, 3, 40, 48)),
        ('-b 6 --train-img-sizes 32 64 --train-batch-sizes 20 10', (10, 3, 64, 64)),
        ('-b 6 --coretune --contrast-batch-size 12', (6, 3, 40, 48)),
    ],
)
def test_the_largest_batch_counts(flags, shape):
    data = parse_args(flags.split()).settings.data
    assert batch_shape(data, (3, 40, 48)) == shape
