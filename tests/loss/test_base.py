"""A loss that the package does not know trains, checkpoints, resumes and runs in two processes"""

import copy
import socket

import pytest
import torch
import torch.nn as nn
from own_loss import MovingMeanLoss
from own_loss_worker import NUM_CLASSES, batches, create_trainer, found_by
from ranks import launch_ranks
from safetensors.torch import load, save
from timm.task import resume_task_checkpoint
from timm.utils import CheckpointSaver

from timm_coretune import CoreTuningLoss, CoreTuningTask
from timm_coretune.loss import LOSSES, METHODS, TaskLoss


def assert_same(state, expected, **tolerance):
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, msg=name, **tolerance)


def test_it_trains_and_its_buffer_follows_the_updates():
    trainer = create_trainer()
    criterion = trainer.task.criterion
    expected = torch.zeros_like(criterion.means)
    losses = []
    for batch in batches():
        losses.append(trainer.train_one_epoch(0, [batch]))
        expected += 0.1 * (criterion.fresh - expected)
        torch.testing.assert_close(criterion.means, expected)
    assert expected.abs().min(dim=1).values.max() > 0
    assert set(losses[0]) == {'loss', 'task', 'pull'}
    assert losses[0]['loss'] == pytest.approx(losses[0]['task'] + 0.1 * losses[0]['pull'], rel=1e-5)


def test_a_resumed_training_continues_bit_for_bit(tmp_path, one_thread):
    first, second = list(batches())[:2], list(batches())[2:]
    trainer = create_trainer()
    trainer.train_one_epoch(0, first)
    saver = CheckpointSaver(
        trainer.task.get_eval_model(), trainer.optimizer, task=trainer.task, checkpoint_dir=str(tmp_path)
    )  # fmt: skip
    saver.save_checkpoint(0, metric=1.0)
    expected = found_by(trainer, trainer.train_one_epoch(1, second))

    resumed = create_trainer(seed=7)
    resume_task_checkpoint(
        resumed.task, str(tmp_path / 'last.pth.tar'), resumed.optimizer.optimizer, weights_only=True
    )  # fmt: skip
    found = found_by(resumed, resumed.train_one_epoch(1, second))
    assert found['losses'] == expected['losses']
    assert_same(found['state'], expected['state'], rtol=0, atol=0)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, one_thread):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    (tmp_path / 'port').write_text(f'{port} 2')
    ranks = launch_ranks('own_loss_worker.py', 2, tmp_path)
    trainer = create_trainer()
    losses = trainer.train_one_epoch(0, list(batches()))
    expected = found_by(trainer, losses)
    for found in ranks:
        assert found['losses'] == pytest.approx(expected['losses'], rel=1e-5)
        assert_same(found['state'], expected['state'], rtol=1e-4, atol=1e-6)


def test_the_state_of_another_loss_is_refused():
    of_coretune = CoreTuningTask(create_trainer().task.get_eval_model(), verbose=False).get_task_state()
    with pytest.raises(RuntimeError, match="state of a MovingMeanLoss, got one with .'generator', 'projector'"):
        create_trainer().task.load_task_state(of_coretune)


def test_a_loss_meets_the_model_before_anything_trains():
    class Copying(TaskLoss):
        def attach(self, model):
            self.encoder = copy.deepcopy(model).requires_grad_(False)

        def compute(self, features, logits, target, batch, clean_loss=None):
            return {'loss': nn.functional.cross_entropy(logits, target)}

    model = create_trainer().task.get_eval_model()
    task = CoreTuningTask(model, Copying(), verbose=False)
    assert_same(task.criterion.encoder.state_dict(), model.state_dict())
    task.get_trainable_module().train()
    task(*next(batches()))['loss'].backward()
    assert all(p.grad is None for p in task.criterion.encoder.parameters())
    assert model.head.weight.grad.abs().max() > 0


# the generator in the state of the loss


@pytest.mark.parametrize(
    'create',
    [lambda g: CoreTuningLoss(4, projection_dim=2, generator=g), lambda g: MovingMeanLoss(4, NUM_CLASSES, generator=g)],
)
def test_the_state_dict_of_a_loss_holds_its_generator_also_through_safetensors(create):
    criterion = create(torch.Generator().manual_seed(1))
    torch.rand(5, generator=criterion.generator)
    other = create(torch.Generator().manual_seed(2))
    other.load_state_dict(load(save(criterion.state_dict())))
    assert torch.equal(other.generator.get_state(), criterion.generator.get_state())
    assert torch.equal(torch.rand(3, generator=other.generator), torch.rand(3, generator=criterion.generator))


def test_the_mixtures_draw_from_the_generator_that_travels():
    criterion = CoreTuningLoss(4, projection_dim=2)
    assert criterion.mixup.generator is criterion.generator
    duplicate = copy.deepcopy(criterion)
    assert duplicate.mixup.generator is duplicate.generator is not criterion.generator


def test_a_state_dict_of_before_the_generator_was_in_it_still_loads():
    criterion = CoreTuningLoss(4, projection_dim=2, generator=torch.Generator().manual_seed(3))
    before = criterion.generator.get_state()
    state = {k: torch.ones_like(v) for k, v in criterion.projector.state_dict(prefix='projector.').items()}
    criterion.load_state_dict(state)
    assert criterion.projector.fc1.weight.eq(1).all()
    assert torch.equal(criterion.generator.get_state(), before)
    with pytest.raises(RuntimeError, match='projector.fc1.weight'):
        criterion.load_state_dict({})


def test_a_loop_that_saves_model_and_loss_continues_with_the_same_mixtures():
    def start(seed):
        torch.manual_seed(seed)
        model = nn.ModuleDict({'backbone': nn.Linear(4, 6), 'head': nn.Linear(6, 3), 'loss': CoreTuningLoss(6)})
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    def steps(model, optimizer, numbers):
        losses = []
        for number in numbers:
            generator = torch.Generator().manual_seed(number)
            features = model['backbone'](torch.randn(8, 4, generator=generator))
            loss = model['loss'](features, model['head'](features), torch.arange(8) % 3)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    model, optimizer = start(0)
    steps(model, optimizer, range(3))
    saved = copy.deepcopy(model.state_dict())
    expected = steps(model, optimizer, range(3, 6))
    resumed, optimizer = start(5)
    resumed.load_state_dict(saved)
    assert steps(resumed, optimizer, range(3, 6)) == expected


def test_every_named_loss_is_one_that_tasks_take():
    assert LOSSES['coretune'] is METHODS['core'] is CoreTuningLoss
    assert set(LOSSES) == set(METHODS) - {'core'} | {'coretune'}
    assert all(issubclass(loss, TaskLoss) for loss in LOSSES.values())
