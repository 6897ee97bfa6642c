"""Recomputed activations: the same gradients from less memory, with --coretune, compiled and in DDP"""

import copy

import pytest
import timm
import torch
import torch.distributed as dist
from runs import results_of

from timm_coretune import CoreTuningTask


def gradients(task, images):
    task.train()
    task(images, torch.tensor([0, 1, 0, 1]))['loss'].backward()
    return {name.removeprefix('module.'): p.grad for name, p in task.trainable_module.named_parameters()}


def saved_bytes(task, images):
    """Bytes of the tensors that a step keeps for its backward pass, without those of parameters."""
    kept, own = {}, {p.untyped_storage().data_ptr() for p in task.parameters()}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        task(images, torch.tensor([0, 1, 0, 1]))
    return sum(x.untyped_storage().nbytes() for place, x in kept.items() if place not in own)


def create_tasks(name, **kwargs):
    """A task, and one of the same weights and draws that recomputes its activations."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=2, **kwargs)
    tasks = []
    for enable in (False, True):
        own = copy.deepcopy(model)
        own.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        tasks.append(CoreTuningTask(own, generator=torch.Generator().manual_seed(0), verbose=False))
    return tasks


@pytest.mark.parametrize('name', ['test_vit', 'test_resnet', 'test_convnext'])
def test_gradients_are_the_same_and_less_is_kept(name):
    images = torch.randn(4, 3, 160, 160)
    plain, recomputing = create_tasks(name)
    found, expected = gradients(recomputing, images), gradients(plain, images)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6)
    assert saved_bytes(recomputing, images) < 0.9 * saved_bytes(plain, images)


@pytest.mark.slow
@pytest.mark.parametrize('wrap', ['compile', 'ddp'])
def test_gradients_are_the_same_where_the_module_is_wrapped(wrap):
    images = torch.randn(4, 3, 160, 160)
    plain, recomputing = create_tasks('test_vit', depth=2)
    if wrap == 'compile':
        recomputing.compile(backend='aot_eager')
        found = gradients(recomputing, images)
        found = {name.removeprefix('_orig_mod.'): gradient for name, gradient in found.items()}
    else:
        dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
        try:
            recomputing.prepare_distributed(find_unused_parameters=False)
            found = gradients(recomputing, images)
        finally:
            dist.destroy_process_group()
    for key, gradient in gradients(plain, images).items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6)


def test_a_model_that_cannot_recompute_says_so(tmp_path):
    with pytest.raises(ValueError, match='--grad-checkpointing.* not supported'):
        results_of(None, tmp_path, '--model', 'pit_ti_224', '--img-size', '224', '--grad-checkpointing')
