"""What the user can mend ends in one line and status 2, and an error of the program keeps its traceback"""

import os

import pytest
import torch
from accelerate.state import AcceleratorState
from runs import ON_CPU
from timm.optim import create_optimizer_v2
from tiny_data import write_folders
from torch.utils.data import DataLoader, Dataset

from timm_coretune.checks import check_target
from timm_coretune.data.images import UnreadableImageError, open_image
from timm_coretune.train import main
from timm_coretune.train.cli.arguments import create_parser
from timm_coretune.train.cli.errors import asked_by, sentence_of


def error_of(function, *args):
    with pytest.raises(Exception) as error:  # noqa: PT011, of any kind
        function(*args)
    return error.value


def ended(words, capsys):
    """The status of train.py with these words, and what it wrote after its log."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    return stopped.value.code, capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    'flags, message',
    [
        ('--model resnet5', "--model: timm has no model 'resnet5'. Nearest: resnet50"),
        ('--data-dir nowhere', "Expected images in --data-dir 'nowhere', which does not exist. Check the path."),
        ('--pretrained-path nowhere.pth', 'nowhere.pth'),
        ('--model resnet18 --img-size 32 --model-kwargs nonsense=1', '--model, --model-kwargs and other flags of the'),
        ('--model-kwargs drop_rate=1', '--model-kwargs: drop_rate has a flag of its own.'),
        ('--gp nonsense', '--model, --model-kwargs and other flags of the model: timm refuses what was given.'),
        ('--opt nonsense', '--opt, --opt-kwargs and other flags of the optimizer: timm refuses what was given.'),
        ('--aa nonsense', '--aa, --interpolation and other flags of images and batches: timm refuses'),
        ('--dataset torch/nonsense --data-dir .', 'of torch/nonsense'),
        ('--log-with nonsense', '--device, --amp, --log-with and the options of accelerate launch: accelerate refuses'),
        ('--log-interval 0', '--log-interval: 1 or more, got 0'),
    ],
)
def test_an_error_of_the_user_is_one_line_that_names_the_flag(tmp_path, data, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    status, line = ended(['--data-dir', data, *ON_CPU, *flags.split()], capsys)
    assert status == 2
    assert line.startswith('train.py: error: ')
    assert message in line


def test_a_corrupt_image_is_named_by_its_path_from_a_loader_process_too(tmp_path, capsys):
    data = write_folders(tmp_path / 'data', {'train/ant': 4, 'train/bee': 4})
    path = data / 'train' / 'ant' / '2.png'
    path.write_bytes(path.read_bytes()[:45] + bytes(9) + path.read_bytes()[54:])  # pixels, between header and end
    words = ['--data-dir', data, *ON_CPU, '--workers', 1, '--val-split=', '--output', tmp_path]
    status, line = ended(words, capsys)
    assert status == 2
    assert line.startswith(f"train.py: error: Expected an image that can be read in '{path}': ")


@pytest.mark.slow
def test_training_that_diverges_ends_in_one_line_and_another_status(tmp_path, data, capsys):
    words = ['--data-dir', data, *ON_CPU, '--lr', '1e30', '--val-split=', '--output', tmp_path]
    status, line = ended(words, capsys)
    assert status == 1
    assert line.startswith('train.py: error: Expected finite losses, got NaN or Inf at update')


@pytest.mark.parametrize('rank, said', [('0', 'train.py: error: --epochs: 0 or more, got -1\n'), ('1', '')])
def test_the_first_process_says_for_all_what_is_wrong_with_the_command_line(monkeypatch, capsys, rank, said):
    monkeypatch.setenv('RANK', rank)
    with pytest.raises(SystemExit) as stopped:
        main(['--epochs', '-1'])
    assert (stopped.value.code, capsys.readouterr().err) == (2, said)
    with pytest.raises(SystemExit):
        create_parser().error('x')


def test_an_error_of_the_program_keeps_its_traceback(monkeypatch, data):
    monkeypatch.setattr('timm_coretune.train.session.set_up', lambda *_: {}['a mistake of ours'])
    with pytest.raises(KeyError, match='a mistake of ours'):
        main(['--data-dir', str(data), *ON_CPU])


def test_what_the_user_can_mend_is_told_from_the_rest(tmp_path):
    target = torch.tensor([5])
    assert sentence_of(error_of(check_target, target, 1, 3)).startswith('Expected')
    assert 'nowhere' in sentence_of(error_of(open, tmp_path / 'nowhere'))
    assert '--batch-size' in sentence_of(torch.OutOfMemoryError('CUDA out of memory.'))
    for function, *args in ((torch.zeros(2).view, 3), (int, 'x'), (lambda: {}['a'],), (lambda: None + 1,)):
        assert sentence_of(error_of(function, *args)) is None


class Broken(Dataset):
    def __init__(self, read):
        self.read = read

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.read(index)


def not_ours(index):
    return int('x')


def ours(index):
    return open_image(__file__, 'RGB')


def test_an_error_of_a_loader_process_is_its_own_sentence():
    (error, other) = (
        error_of(next, iter(DataLoader(Broken(read), num_workers=1, multiprocessing_context='fork')))
        for read in (ours, not_ours)
    )
    assert isinstance(error, UnreadableImageError)
    assert sentence_of(error) == (
        f'Expected an image that can be read in {__file__!r}: no kind of image that PIL knows.'
    )
    assert sentence_of(other) is None


def test_an_error_of_a_library_gets_the_flags_and_one_of_ours_stays():
    with pytest.raises(ValueError, match=r'^--opt: timm refuses what was given\. .*nonsense'), asked_by('--opt'):
        create_optimizer_v2(torch.nn.Linear(1, 1), 'nonsense')
    with pytest.raises(FileNotFoundError, match='nowhere'), asked_by('--opt'):
        os.stat('nowhere')
    with pytest.raises(ValueError, match='^Expected') as error, asked_by('--opt'):
        check_target(torch.tensor([5]), 1, 3)
    assert '--opt' not in str(error.value)
