"""Batches and tasks of tests of CachedStep, and the gradients of one graph that they are compared with"""

from typing import Any, Dict, List, NamedTuple, Sequence

import timm
import torch
import torch.nn as nn

from timm_coretune import CoreTuningTask

NUM_CLASSES, IMAGE_SIZE = 4, 32
LABEL = (0, 1, 0, 2, 1, 3, 0, 2, 1, 0, 3, 1)


class Scenario(NamedTuple):
    """A model and a loss.

    Attributes:
        model: Name of the model.
        model_kwargs: Its arguments.
        loss_kwargs: Arguments of the task.
        mlp: Give the model a classifier that is not affine, by which mixtures must be classified.
        eval_norm: Keep BatchNorm in evaluation mode.
    """

    model: str = 'test_vit'
    model_kwargs: Dict[str, Any] = {}
    loss_kwargs: Dict[str, Any] = {}
    mlp: bool = False
    eval_norm: bool = False


SCENARIOS = {
    'vit': Scenario(),
    'vit, drop path and dropout': Scenario(model_kwargs={'drop_path_rate': 0.3, 'proj_drop_rate': 0.2}),
    'resnet': Scenario('test_resnet'),
    'resnet, BatchNorm in evaluation mode': Scenario('test_resnet', eval_norm=True),
    'classifier of two layers': Scenario(mlp=True),
    'no contrast': Scenario(loss_kwargs={'contrast_weight': 0.0}),
    'nothing mixed, scl': Scenario(loss_kwargs={'criterion': 'scl'}),
    'coin, before cross-entropy': Scenario(loss_kwargs={'criterion': 'coin'}),
}


def make_task(scenario: Scenario, **loss_kwargs: Any) -> CoreTuningTask:
    size = {'img_size': IMAGE_SIZE} if scenario.model == 'test_vit' else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(scenario.model, num_classes=NUM_CLASSES, **size, **scenario.model_kwargs)
        if scenario.mlp:
            width = model.num_features
            model.head = nn.Sequential(nn.Linear(width, 7), nn.Tanh(), nn.Linear(7, NUM_CLASSES))
        task = CoreTuningTask(
            model.double(),
            device=torch.device('cpu'),
            dtype=torch.float64,
            verbose=False,
            **{'projection_dim': 8, 'contrast_weight': 1.0, **scenario.loss_kwargs, **loss_kwargs},
            generator=torch.Generator().manual_seed(5),
        )
    task.start(100)
    task.train()
    if scenario.eval_norm:
        for module in task.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
    return task


def batch(seed: int = 1, num_images: int = len(LABEL)):
    """Images and class indices."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(num_images, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.float64, generator=generator)
    return images, torch.tensor(LABEL[:num_images]).roll(seed)


def backward_in_one_graph(
    task: CoreTuningTask, chunks: Sequence[torch.Tensor], target: torch.Tensor
) -> Dict[str, torch.Tensor]:
    """Loss of a batch whose chunks go through the model one by one, but in one graph. Gradients are added up."""
    model, criterion = task.trainable_module.model, task.criterion
    prepared = criterion.prepare(len(target), target.device)
    rows: List[List[torch.Tensor]] = [[], []]
    for chunk in chunks:
        features = model.forward_head(model.forward_features(chunk), pre_logits=True)
        rows[0].append(features)
        rows[1].append(model.get_classifier()(features))
    features, logits = map(torch.cat, rows)
    classifier = {'classifier': model.get_classifier()} if 'classifier' in criterion.requires else {}
    losses = criterion.compute(features, logits, target, *prepared, **classifier)
    losses['loss'].backward()
    return {**{name: loss.detach() for name, loss in losses.items()}, 'output': logits.detach()}


def gradients(task: CoreTuningTask) -> Dict[str, torch.Tensor]:
    named = task.trainable_module.named_parameters()
    return {name.removeprefix('module.'): p.grad for name, p in named}


def buffers(task: CoreTuningTask) -> Dict[str, torch.Tensor]:
    return {name.removeprefix('module.'): b.clone() for name, b in task.trainable_module.named_buffers()}


def assert_near(actual: Dict[str, Any], expected: Dict[str, Any], tolerance: float = 1e-10) -> None:
    """Tensors by name are equal up to a share of the greatest value in all of them. None is equal to None."""
    assert actual.keys() == expected.keys()
    scale = max((float(x.abs().max()) for x in expected.values() if x is not None), default=0.0)
    for name, value in expected.items():
        assert (actual[name] is None) == (value is None), name
        if value is not None:
            assert float((actual[name] - value).abs().max()) <= tolerance * scale, name
