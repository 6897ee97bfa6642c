"""A step that diverged is kept and repeated: in the bits of its losses, with the module in which it begins"""

import pytest
import torch
from accelerate.state import AcceleratorState
from commands import ONE_THREAD, environment_with, in_two_processes
from paths import ROOT
from runs import ON_CPU, results_of, train
from safetensors.torch import load_file, save_file

from timm_coretune.train.loss_meter import DivergedError, LossMeter
from timm_coretune.train.replay import main, replay

HUGE = ('--coretune', '--lr', '1e6', '--workers', '0')


def again(folder, capsys, **kwargs):
    AcceleratorState._reset_state(reset_partial_state=True)
    capsys.readouterr()
    return replay(str(folder), **kwargs), capsys.readouterr().out


@pytest.fixture
def diverge_at(monkeypatch):
    """Makes a run take finite losses for bad ones at an update, so that their bits can be compared."""

    def diverge_at(update):
        original = LossMeter.check

        def check(self):
            original(self)
            if self.num_steps == update:
                raise DivergedError('bad')

        monkeypatch.setattr(LossMeter, 'check', check)

    return diverge_at


@pytest.mark.parametrize(
    'flags',
    [
        ['--coretune', '--drop', 0.5, '--drop-path', 0.2],
        ['--method', 'bi-tuning', '--channels-last', '--mixup', 0.2],
        ['--coretune', '--amp', '--amp-dtype', 'bfloat16', '--freeze-epochs', 1],
        ['--coretune', '--contrast-batch-size', 16, '--drop', 0.5],
        ['--mixup', 0.5, '--no-prefetcher', '--drop', 0.5, '--grad-accum-steps', 2],
    ],
    ids=['core', 'bi-tuning', 'bfloat16', 'cached', 'plain'],
)
def test_losses_come_again_to_the_bit(flags, tiny, tmp_path, diverge_at, capsys):
    diverge_at(2)
    with pytest.raises(DivergedError, match='bad The step is kept, and `timm-coretune replay .*run` repeats it.'):
        results_of(tiny, tmp_path, *flags)
    folder = tmp_path / 'run'
    torch.manual_seed(12345)  # what the process has drawn does not matter
    is_same, out = again(folder, capsys)
    assert is_same, out
    assert 'The losses are those of the run.' in out
    shown = [float(line.split(': ')[1]) for line in out.splitlines()[1:] if line.startswith('  loss')]
    assert 0 < shown[0] < 20
    assert 'Weights before the step: finite.' in out
    # with other weights they would be others
    weights = folder / 'diverged' / 'weights.safetensors'
    changed = load_file(weights)
    name = next(name for name in changed if name in ('fc.weight', 'model.fc.weight'))
    save_file({**changed, name: 1.01 * changed[name]}, weights)
    is_same, out = again(folder, capsys)
    assert not is_same
    assert ', in the run ' in out


def test_the_first_module_with_a_value_that_is_not_finite_is_named(tiny, tmp_path, diverge_at, capsys):
    diverge_at(1)
    with pytest.raises(DivergedError):
        results_of(tiny, tmp_path, '--coretune')
    weights = tmp_path / 'run' / 'diverged' / 'weights.safetensors'
    state = load_file(weights)
    state['model.layer2.0.conv1.weight'][0, 0, 0, 0] = float('nan')
    save_file(state, weights)
    is_same, out = again(tmp_path / 'run', capsys)
    assert not is_same
    assert 'Weights before the step: not finite in 1 tensors, model.layer2.0.conv1.weight.' in out
    expected = 'model.layer2.0.conv1 (Conv2d), with finite inputs, its weight not finite.'
    assert f'First module whose output is not finite: {expected}' in out


def test_without_a_step_there_is_an_error(tiny, tmp_path, capsys):
    folder = train(tiny, tmp_path, '--epochs', 1)
    assert not (folder / 'diverged').exists()
    with pytest.raises(SystemExit) as e:
        main([str(folder)])
    assert e.value.code == 2
    assert 'Expected a step that diverged in' in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_keep_their_shares_and_repeat_them_and_measure_the_features_of_one(
    tiny_images, tmp_path, launch, capsys, messages
):
    data = tiny_images((8, 8, 8), (8, 8, 7), size=32, tint=20, noise=230)  # of 23 images one process has one more
    environment = environment_with(**ONE_THREAD)
    flags = ['--data-dir', data, '--output', tmp_path, *ON_CPU, *HUGE, '--watch-features', 1, '-b', 4]
    words = in_two_processes(ROOT / 'train.py', *flags, '--catch-diverged', '--experiment', 'run')
    finished = launch(words, environment=environment, check=False)
    assert 'timm-coretune replay' in finished.stderr, finished.stderr
    folder = tmp_path / 'run'
    names = {path.name for path in (folder / 'diverged').iterdir()}
    assert names == {'step.json', 'weights.safetensors', 'process-0.safetensors', 'process-1.safetensors'}
    words = in_two_processes('-m', 'timm_coretune', 'replay', folder)
    found = launch(words, environment=environment, check=False)
    assert found.stdout.count('The losses are those of the run.') == 2, found.stdout + found.stderr
    _, out = again(folder, capsys, process=1)
    assert 'process 1:' in out
    with pytest.raises(DivergedError):
        results_of(data, tmp_path / 'one', *HUGE, '--watch-features', 1)
    (alone,) = [message for message in messages() if message.startswith('Features (start)')]
    assert alone.partition('  Time')[0] in finished.stdout + finished.stderr
