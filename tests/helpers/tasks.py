"""Small tasks and batches for them"""

import timm
import torch

from timm_coretune import CoreTuningTask

NUM_CLASSES = 4

IMAGE_SIZE = 64  # leaves 2 x 2 after a stride of 32, so that BatchNorm trains on one image

FAMILIES = ('test_resnet', 'test_efficientnet', 'test_vit')

TARGET = torch.tensor([0, 1, 0, 2, 1, 0])

BATCH_SIZE = 6


def create_model(name='test_resnet', num_classes=NUM_CLASSES, seed=0, **kwargs):
    torch.manual_seed(seed)
    if name == 'test_vit':
        kwargs.setdefault('img_size', IMAGE_SIZE)
    return timm.create_model(name, num_classes=num_classes, **kwargs)


def create_task(model=None, seed=0, **kwargs):
    model = create_model() if model is None else model
    torch.manual_seed(seed)
    return CoreTuningTask(model, verbose=False, **kwargs)


def images(batch_size=BATCH_SIZE, seed=1):
    return torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


def step(task, input, target, optimizer):
    result = task(input, target)
    optimizer.zero_grad()
    result['loss'].backward()
    optimizer.step()
    return result


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters()}


def count_calls(model):
    """Calls of every module without children, counted from now on."""
    calls = {name: 0 for name, module in model.named_modules() if not list(module.children())}

    def count(name):
        def hook(module, args, output):
            calls[name] += 1

        return hook

    for name in calls:
        model.get_submodule(name).register_forward_hook(count(name))
    return calls


def assert_same_state(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name
