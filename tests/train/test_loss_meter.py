"""The averages of the losses: one operation a step, and sums that do not depend on when they are read"""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from timm_coretune.train.loss_meter import DivergedError, LossMeter


def meter():
    return LossMeter(Accelerator(cpu=True))


def losses(count):
    values = np.random.default_rng(0).random((count, 2), dtype=np.float32)
    return [{'loss': torch.tensor(a), 'task_loss': torch.tensor(b), 'output': None} for a, b in values], values


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.append(func)
        return func(*args, **(kwargs or {}))


def test_a_step_is_one_operation():
    found, (result,) = meter(), losses(1)[0]
    found.update(result, 1)
    with Operations() as operations:
        found.update(result, 2)
    assert set(operations.found) - {torch.ops.aten.detach.default} == {torch.ops.aten.stack.default}
    assert operations.found.count(torch.ops.aten.stack.default) == 1


@pytest.mark.parametrize('read_at', [(), (0, 7, 8, 30), range(40)], ids=['at-the-end', 'at-times', 'always'])
def test_sums_are_added_in_the_order_of_the_steps_whenever_they_are_read(read_at):
    found = meter()
    results, values = losses(40)
    for step, result in enumerate(results):
        found.update(result, step)
        if step in read_at:
            found.check()
    total = np.zeros(2, dtype=np.float32)
    for row in values:  # not np.sum, which adds in pairs
        total = total + row
    assert found.average() == dict(zip(('loss', 'task'), (total / np.float32(40)).tolist(), strict=True))
    assert found.now() == dict(zip(('loss', 'task'), values[-1].tolist(), strict=True))
    other = meter()
    other.load_state_dict(found.state_dict())
    assert other.average() == found.average()


def test_the_first_step_that_diverges_is_named_also_if_the_losses_are_read_later():
    found = meter()
    results, values = losses(6)
    results[3]['task_loss'] = torch.tensor(float('inf'))
    results[4]['loss'] = torch.tensor(float('nan'))
    for step, result in enumerate(results):
        found.update(result, 10 + step)
    with pytest.raises(DivergedError, match=f'at update 13. The last finite losses: loss {values[2, 0]:.4g}, task '):
        found.check()
