"""The schedule of a run"""

import pytest
import torch

from timm_coretune.train.cli.settings import OptimizationSettings
from timm_coretune.train.optimization import create_schedule


def rates(seed, **settings):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    optimizer.param_groups[0]['initial_lr'] = 0.1
    scheduler, num_epochs = create_schedule(OptimizationSettings(epochs=8, **settings), optimizer, 1, seed=seed)
    found = []
    for epoch in range(num_epochs):
        scheduler.step(epoch)
        found.append(optimizer.param_groups[0]['lr'])
    return found


def test_the_noise_of_the_rate_follows_the_seed():
    noisy = dict(lr_noise=[0.0, 1.0], warmup_epochs=0)
    assert rates(1, **noisy) == rates(1, **noisy) != rates(2, **noisy)
    assert rates(1, warmup_epochs=0) == rates(2, warmup_epochs=0)


@pytest.mark.parametrize('metric, mode', [('top1', 'max'), ('loss', 'min'), ('ece', 'min'), ('miou', 'max')])
def test_a_plateau_is_where_the_score_gets_no_better(metric, mode):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    optimizer.param_groups[0]['initial_lr'] = 0.1
    scheduler, _ = create_schedule(OptimizationSettings(sched='plateau'), optimizer, 1, eval_metric=metric)
    assert scheduler.lr_scheduler.mode == mode
