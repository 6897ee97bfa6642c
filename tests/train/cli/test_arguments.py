"""The command line: names that are none, and what wins: a flag, a configuration, a preset, the sample or timm"""

import os

import pytest
import yaml
from train_flags import ACTIONS, PACKAGE, PARSER, flat, preset

from timm_coretune.train.cli.arguments import PRESETS, parse_args

# what is not part of the file that repeats a run
OF_ONE_START = (
    *('device', 'push_to_hub', 'hub_private', 'hub_revision', 'resume', 'no_resume_opt', 'wandb_resume_id'),
    *('local_rank', 'config', 'data', 'report'),
)


def test_defaults_fill_in_the_sample_and_its_checkpoint():
    parsed = parse_args([])
    settings = parsed.settings
    assert settings.model.model == 'test_resnet'
    assert os.path.isfile(settings.data.data_dir)
    assert os.path.isfile(settings.model.pretrained_path)
    assert '--data-dir DIR --model NAME --pretrained-path FILE' in parsed.assumed
    expected = {k: v for k, v in {**settings.flat(), 'preset': None}.items() if k not in OF_ONE_START}
    assert yaml.safe_load(parsed.text) == expected


@pytest.mark.parametrize(
    'epochs, warmup', [(100, 5), (200, 10), (50, 3), (10, 1), (5, 1), (2, 1), (1, 0)], ids=lambda n: str(n)
)
def test_the_warmup_of_a_preset_has_its_share_of_the_epochs(epochs, warmup, tmp_path):
    words = ['--data-dir', '.', '--preset', 'vit']
    assert flat([*words, '--epochs', str(epochs)]).warmup_epochs == warmup
    assert flat([*words, '--epochs', str(epochs), '--warmup-epochs', '7']).warmup_epochs == 7
    assert flat(['--data-dir', '.', '--preset', 'cnn', '--epochs', str(epochs)]).warmup_epochs == 0
    config = tmp_path / 'config.yaml'
    config.write_text(f'preset: vit\nepochs: {epochs}\n')
    assert flat(['--data-dir', '.', '-c', str(config)]).warmup_epochs == warmup


def test_flags_win_over_yaml_and_yaml_over_the_sample_recipe(tmp_path):
    config = tmp_path / 'config.yaml'
    config.write_text('lr: 0.3\nbatch_size: 7\n')
    args = flat(['-c', str(config), '-b', '9'])
    assert (args.lr, args.batch_size, args.img_size) == (0.3, 9, 32)


def test_a_named_model_keeps_neither_the_sample_checkpoint_nor_a_size_it_cannot_take():
    args = flat(['--model', 'resnet50'])
    assert (args.model, args.pretrained_path, args.img_size) == ('resnet50', None, 32)
    assert flat(['--model', 'vit_tiny_patch16_224']).img_size is None


def test_own_data_gets_the_defaults_of_timm(tmp_path):
    parsed = parse_args(['--data-dir', str(tmp_path)])
    assert parsed.assumed is None
    args = flat(['--data-dir', str(tmp_path)])
    assert (args.model, args.epochs, args.batch_size) == ('resnet50', 300, 128)
    assert flat([str(tmp_path)]).data_dir == str(tmp_path)


# names that are none


@pytest.mark.parametrize(
    'flag, nearest',
    [
        ('--wieght-decay', '--weight-decay'),
        ('--core-tune', '--coretune'),
        ('--batchsize=4', '--batch-size'),
        ('--label-fractions', '--label-fraction'),
    ],
)
def test_an_unknown_flag_names_the_nearest(capsys, flag, nearest):
    with pytest.raises(SystemExit):
        parse_args([flag])
    assert f'unrecognized arguments: {flag} (nearest: {nearest})' in capsys.readouterr().err


def test_a_flag_like_nothing_is_refused_without_a_guess(capsys):
    with pytest.raises(SystemExit):
        parse_args(['--qqqqqqqq'])
    assert 'unrecognized arguments: --qqqqqqqq\n' in capsys.readouterr().err


@pytest.mark.parametrize(
    'text, message',
    [
        ('batch-size: 4\n', 'has keys that are no options: batch-size (nearest: batch_size)'),
        ('lr: 1\nlearning_rate: 2\nwarmup_epoch: 1\n', 'no options: learning_rate, warmup_epoch'),
        ('preset: resnet\n', "expected one of cnn, vit, got 'resnet'"),
        ('- lr\n', 'expected lines of NAME: VALUE in'),
        ('no_such_key: 1\n', 'keys that are no options: no_such_key'),
        ('a: [\n', 'cannot read'),
    ],
    ids=['dash', 'two', 'preset', 'list', 'unknown-key', 'no-yaml'],
)
def test_a_config_that_is_none_is_refused(tmp_path, capsys, text, message):
    (tmp_path / 'config.yaml').write_text(text)
    with pytest.raises(SystemExit):
        parse_args(['-c', str(tmp_path / 'config.yaml')])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    'text, message',
    [
        ('mixup_mode: nope', "mixup_mode in 'FILE': expected one of batch, pair, elem, half, got 'nope'"),
        ('epochs: 2.5', "epochs in 'FILE': expected a whole number, got 2.5"),
        ('lr: [0.1]', "lr in 'FILE': expected a number, got [0.1]"),
        ('lr: fast', "lr in 'FILE': expected a number, got 'fast'"),
        ('epochs: ten', "epochs in 'FILE': expected a whole number, got 'ten'"),
        ('epochs: true', "epochs in 'FILE': expected a whole number, got True"),
        ('epochs:', "epochs in 'FILE': expected a whole number, got nothing"),
        ('input_size: 224', "input_size in 'FILE': expected a list of 3 values, got 224"),
        ('input_size: [3, 32]', "input_size in 'FILE': expected a list of 3 values, got [3, 32]"),
        ('mean: 0.5', "mean in 'FILE': expected a list, such as [1, 2], got 0.5"),
        ('decay_milestones: [1, x]', "decay_milestones in 'FILE': expected a whole number, got [1, 'x']"),
        ("amp: 'yes please'", "amp in 'FILE': expected true or false, got 'yes please'"),
        ('coretune: 1', "coretune in 'FILE': expected true or false, got 1"),
        ('model: [resnet18]', "model in 'FILE': expected text, got ['resnet18']"),
        ('model_kwargs: a=1', "model_kwargs in 'FILE': expected lines of NAME: VALUE below it, got 'a=1'"),
    ],
)
def test_a_value_in_a_config_must_be_one_that_the_flag_takes(tmp_path, capsys, text, message):
    config = tmp_path / 'config.yaml'
    config.write_text(text)
    with pytest.raises(SystemExit):
        parse_args(['-c', str(config)])
    assert capsys.readouterr().err == f'train.py: error: argument -c/--config: {message}\n'.replace('FILE', str(config))


def test_values_of_a_config_are_those_of_the_command_line(tmp_path):
    config = tmp_path / 'config.yaml'
    config.write_text(
        "lr: 3e-4\nepochs: '10'\nmean: ['0.5', 0.4, '3e-1']\nstop_epoch: null\nsave_epochs: [4, 8]\nsched: wsd\n"
        'experiment: 7\nmodel_kwargs: {output_stride: 8}\namp: true\n'
    )
    args = flat(['-c', str(config)])
    assert (args.lr, args.epochs, args.mean, args.stop_epoch) == (3e-4, 10, [0.5, 0.4, 0.3], None)
    assert (args.save_epochs, args.sched, args.experiment, args.amp) == ([4, 8], 'wsd', '7', True)
    assert args.model_kwargs == {'output_stride': 8}


# what wins


def test_flag_wins_over_yaml_over_preset_over_sample_over_default(tmp_path):
    config = tmp_path / 'config.yaml'
    config.write_text('epochs: 7\npreset: vit\n')
    levels = [
        (['--epochs', '3', '-c', str(config)], 3),
        (['-c', str(config)], 7),
        (['--preset', 'vit'], 100),
        ([], 15),
        (['--data-dir', str(tmp_path)], 300),
    ]
    assert [flat(line).epochs for line, _ in levels] == [epochs for _, epochs in levels]
    assert flat(['-c', str(config)]).layer_decay == preset('vit')['layer_decay']


@pytest.mark.parametrize('name', PRESETS)
def test_a_preset_sets_known_options_to_values_they_take(name):
    values = preset(name)
    line = []
    for key, value in values.items():
        action = ACTIONS[f'--{key.replace("_", "-")}']
        assert action.dest == key
        line += [action.option_strings[0]]
        line += [] if value is True else [str(v) for v in (value if isinstance(value, list) else [value])]
    spelled = vars(flat(['--data-dir', '.', *line]))
    args = vars(flat(['--data-dir', '.', '--preset', name]))
    assert args == spelled
    assert {key: args[key] for key in values} == values


@pytest.mark.parametrize(
    'line, lr',
    [
        ([], 0.05),
        (['--preset', 'vit'], None),
        (['--lr-base', '0.01'], None),
        (['--lr-base', '0.01', '--lr', '0.2'], 0.2),
    ],
    ids=['sample', 'preset', 'lr-base', 'lr'],
)
def test_the_rate_of_the_sample_recipe_gives_way_to_a_base_rate_that_was_asked_for(line, lr):
    assert flat(line).lr == lr


SEGMENTATION_RECIPE = yaml.safe_load((PACKAGE / 'assets' / 'sample_segmentation.yaml').read_text())


def test_segmentation_alone_takes_the_recipe_of_the_scenes():
    parsed = parse_args(['--segmentation'])
    paths = {key: str(PACKAGE / 'assets' / SEGMENTATION_RECIPE[key]) for key in ('data_dir', 'pretrained_path')}
    args = flat(['--segmentation'])
    taken = {key: getattr(args, key) for key in SEGMENTATION_RECIPE}
    assert taken == {**SEGMENTATION_RECIPE, **paths}
    assert (args.epochs, args.eval_metric) == (8, 'miou')
    assert 'scenes made of the bundled Fashion-MNIST sample with its recipe' in parsed.assumed


def test_segmentation_with_a_named_model_leaves_out_what_fits_that_of_the_recipe_alone():
    args = flat(['--segmentation', '--model', 'resnet50'])
    assert (args.model, args.pretrained_path, args.model_kwargs) == ('resnet50', None, {})
    assert (args.epochs, args.img_size, args.data_dir[-12:]) == (8, 96, '.safetensors')


@pytest.mark.parametrize(
    'line, metric',
    [
        (['--segmentation', '--eval-metric', 'pa'], 'pa'),
        (['--segmentation', '--data-dir', '.'], 'miou'),
        (['--segmentation', '-c', 'metric.yaml'], 'loss'),
        (['-c', 'task.yaml', '--eval-metric', 'fwiou'], 'fwiou'),
        (['--data-dir', '.'], 'top1'),
    ],
)
def test_the_metric_of_pixels_is_a_default_like_others(tmp_path, monkeypatch, line, metric):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'metric.yaml').write_text('eval_metric: loss\n')
    (tmp_path / 'task.yaml').write_text('segmentation: true\n')
    assert flat(line).eval_metric == metric


def test_segmentation_in_a_config_works_as_the_flag_does(tmp_path):
    config = tmp_path / 'config.yaml'
    config.write_text('segmentation: true\nepochs: 3\n')
    flags = vars(flat(['--segmentation', '--epochs', '3']))
    assert vars(flat(['-c', str(config)])) == flags


def test_help_names_every_flag_and_says_something_of_each(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_args(['--help'])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert [a.dest for a in PARSER._actions if not (a.help or '').strip()] == []
    assert [name for name in ACTIONS if name not in text] == []


def test_a_search_of_the_help_finds_a_flag_with_what_it_does(capsys):
    with pytest.raises(SystemExit):
        parse_args(['--help'])
    lines = capsys.readouterr().out.splitlines()
    for action in PARSER._actions:
        name = (action.option_strings or [action.metavar])[-1]
        assert any(name in line and line.endswith(action.help.replace('%%', '%')) for line in lines), name


# the file that repeats a run


def saved(tmp_path, *line):
    """The settings that the file of a run with this command line gives to another."""
    parsed = parse_args([str(word) for word in line])
    (tmp_path / 'args.yaml').write_text(parsed.text)
    return parsed, parse_args(['-c', str(tmp_path / 'args.yaml')])


def test_the_saved_file_repeats_a_run_but_neither_publishes_nor_resumes_nor_asks_for_a_device(tmp_path):
    line = ['--data-dir', tmp_path, '--preset', 'vit', '--model', 'test_vit', '--epochs', 3, '--experiment', 'e']
    once = ['--push-to-hub', 'me/tuned', '--hub-private', '--hub-revision', 'b', '--resume', 'auto', '--start-epoch', 2]
    first, again = saved(tmp_path, *line, *once)
    assert first.settings.output.push_to_hub == 'me/tuned'
    assert again.settings.flat() == parse_args([str(word) for word in line]).settings.flat()
    assert 'device' not in again.given
    assert again.assumed is None


def test_the_saved_file_keeps_a_device_that_was_given(tmp_path):
    _, again = saved(tmp_path, '--device', 'cpu')
    assert again.settings.loop.device == 'cpu'
    assert 'device' in again.given


def test_the_saved_file_tells_what_was_given_from_what_was_not(tmp_path):
    parsed, _ = saved(tmp_path, '--epochs', 3, tmp_path, '--coretune')
    given, rest = parsed.text.split('# given:\n')[1].split('# defaults, or from a preset or recipe:\n')
    assert yaml.safe_load(given) == {'epochs': 3, 'coretune': True, 'data_dir': str(tmp_path)}
    assert yaml.safe_load(rest)['batch_size'] == 128


def test_a_saved_file_of_an_earlier_version_is_not_published_again_either(tmp_path):
    old = {**flat(['--epochs', '3']).__dict__, 'config': '', 'data': None, 'preset': None}
    old.update(push_to_hub='me/tuned', device='cuda', resume='auto', hub_private=True)
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump(old))
    parsed = parse_args(['-c', str(tmp_path / 'args.yaml')])
    assert parsed.settings.output.push_to_hub is None
    assert not parsed.settings.output.hub_private
    assert parsed.settings.output.resume == ''
    assert 'device' not in parsed.given
    assert 'push_to_hub, hub_private, resume, device left out' in parsed.assumed
    own = tmp_path / 'own.yaml'
    own.write_text('push_to_hub: me/tuned\ndevice: cpu\n')  # what a user writes is taken as it is
    parsed = parse_args(['-c', str(own)])
    assert (parsed.settings.output.push_to_hub, parsed.settings.loop.device) == ('me/tuned', 'cpu')
