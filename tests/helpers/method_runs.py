"""A small run of any method, for the table of tests/loss/test_methods.py and its worker"""

from typing import NamedTuple

import timm
import torch
from timm.task import resume_task_checkpoint

from timm_coretune import CoreTuningTask
from timm_coretune.loss import METHODS, arguments_of

NUM_CLASSES, NUM_UPDATES, BATCH_SIZE = 3, 5, 8
# what a method is called with here, beyond a narrow projection
ARGUMENTS = {'coin': {'contrast_only': 0.5}}


def create_model(seed=0, dtype=None):
    """A vision transformer: it mixes no rows of a batch, so that two processes can equal one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model('test_vit', num_classes=NUM_CLASSES, img_size=32, depth=1, embed_dim=16, num_heads=2)
        torch.nn.init.normal_(model.head.weight, std=0.5)
    return model.to(dtype)


def arguments(method, **kwargs):
    narrow = {'projection_dim': 8} if 'projection_dim' in arguments_of(METHODS[method]) else {}
    return {**narrow, **ARGUMENTS.get(method, {}), **kwargs}


class Run(NamedTuple):
    task: CoreTuningTask
    optimizer: torch.optim.Optimizer

    def update(self, batch):
        """Losses of a batch, after which the weights are updated."""
        result = self.task(*batch)
        self.optimizer.zero_grad()
        result['loss'].backward()
        self.optimizer.step()
        self.task.after_update()
        return {name: value.item() for name, value in result.items() if name.endswith('loss')}

    def state(self):
        module = timm.utils.unwrap_model(self.task.trainable_module)
        return {name: value.clone() for name, value in module.state_dict().items()}


def create_run(method, seed=0, dtype=None, prepare=lambda task: None, checkpoint=None, **kwargs):
    """A run before its first update, in the order of train.py.

    Args:
        method: Name of the method.
        seed: Seed of all weights.
        dtype: Dtype of all weights.
        prepare: Called with the task, as to wrap it.
        checkpoint: Training state to continue.
        **kwargs: Arguments of the loss.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = create_model(seed, dtype)
    task = CoreTuningTask(
        model, method, dtype=dtype, verbose=False, **arguments(method, generator=generator, **kwargs)
    )  # fmt: skip
    prepare(task)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1, momentum=0.9)
    if checkpoint is not None:
        resume_task_checkpoint(task, str(checkpoint), optimizer, weights_only=True)
    task.attach_optimizer(optimizer)
    task.start(NUM_UPDATES)
    task.get_trainable_module().train()
    return Run(task, optimizer)


def batches(rank=0, num_processes=1, dtype=torch.float32):
    """Image b of process r is image b * num_processes + r of a single process."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(NUM_UPDATES):
        images = torch.randn(BATCH_SIZE, 3, 32, 32, generator=generator).to(dtype)
        target = torch.randint(NUM_CLASSES, (BATCH_SIZE,), generator=generator)
        found.append((images[rank::num_processes], target[rank::num_processes]))
    return found
