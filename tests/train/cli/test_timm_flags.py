"""The command line: timm's flags and ours, what contradicts, what wins over what, and docs/flags.md"""

import argparse
import ast
import json
import re

import pytest
import yaml
from paths import HELPERS, ROOT
from timm.data import resolve_data_config
from timm.optim import optimizer_kwargs
from timm.scheduler import scheduler_kwargs
from timm.utils import ParseKwargs

from timm_coretune.train.cli.arguments import find_contradictions, parse_args
from timm_coretune.train.cli.flags import PRESETS, create_parser

PACKAGE = ROOT / 'timm_coretune'
TIMM_OPTIONS = json.loads((HELPERS / 'timm_train_flags.json').read_text())['options']
PARSER = create_parser()
ACTIONS = {name: action for action in PARSER._actions for name in action.option_strings or [action.dest]}
TIMM_NAMES = {name for option in TIMM_OPTIONS for name in option['flags']}
OWN_ACTIONS = [a for a in PARSER._actions if a.dest != 'help' and not TIMM_NAMES & {*a.option_strings, a.dest}]


def options_by_name(options):
    return [pytest.param(option, id=option['flags'][-1]) for option in options]


# what timm has


def test_the_list_of_timm_is_whole():
    assert len(TIMM_OPTIONS) == 173


@pytest.mark.parametrize('option', options_by_name(TIMM_OPTIONS))
def test_a_timm_flag_is_known_with_its_default_and_kind(option):
    action = ACTIONS[option['flags'][0]]
    assert {ACTIONS[name] for name in option['flags']} == {action}
    is_switch = option.get('action') == 'store_true'
    default = option.get('default', False if is_switch else None)
    if option['flags'] == ['--ratio']:
        default = [3.0 / 4.0, 4.0 / 3.0]  # an expression in the list
    assert action.default == default
    assert action.nargs == (0 if is_switch else option.get('nargs'))
    assert isinstance(action, argparse._StoreTrueAction) == is_switch
    assert isinstance(action, ParseKwargs) == (option.get('action') == 'utils.ParseKwargs')
    assert action.type in ({'int': [int], 'float': [float]}.get(option.get('type'), [None, str]))
    if 'choices' in option:
        assert list(action.choices) == option['choices']
    if action.nargs == '?':
        assert action.const == option['const']


def test_timm_reads_a_flag_under_the_same_name():
    for option in TIMM_OPTIONS:
        long = next((name for name in option['flags'] if name.startswith('--')), option['flags'][0])
        assert ACTIONS[long].dest == option.get('dest', long.lstrip('-').replace('-', '_'))


def test_one_flag_of_ours_is_what_argparse_takes_for_an_abbreviation_in_timm():
    names = {name for action in OWN_ACTIONS for name in action.option_strings}
    assert {name for name in names if any(other.startswith(name) for other in TIMM_NAMES)} == {'--patience'}
    assert '`--patience` is a flag of its own' in (ROOT / 'docs' / 'flags.md').read_text()


# nothing is accepted and ignored


class _Reads(dict):
    """A dictionary and a namespace of None that note which names are read."""

    def get(self, key, default=None):
        self[key] = None

    def __contains__(self, key):
        return self.get(key) is not None

    __getattr__ = __getitem__ = get


def read_by_timm():
    reads = _Reads(nothing=None)
    optimizer_kwargs(reads)
    scheduler_kwargs(reads, decreasing_metric=True)
    resolve_data_config(reads, pretrained_cfg={})
    return set(dict(reads)) - {'nothing'}


def names_read(tree):
    """Names read as args.NAME, given['NAME'] or given.get('NAME')."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            if getattr(node.value, 'id', getattr(node.value, 'attr', '')) == 'args':
                names.add(node.attr)
        elif isinstance(node, ast.Subscript) and getattr(node.value, 'id', '') == 'given':
            names.add(getattr(node.slice, 'value', None))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == 'given.get' and node.args:
            names.add(getattr(node.args[0], 'value', None))
    return names


def test_the_reads_of_a_source_are_seen():
    source = """
args.one.copy()
self.args.two = args.three
given['four'], given["five"], given.get('six')
print('args.seven')
f'{args.eight}'
"""
    assert names_read(ast.parse(source)) == {'one', 'three', 'four', 'five', 'six', 'eight'}


TREES = {path.name: ast.parse(path.read_text()) for path in (PACKAGE / 'train').glob('*.py')}
READ = set().union(read_by_timm(), *map(names_read, TREES.values()))


@pytest.mark.parametrize('dest', [a.dest for a in PARSER._actions if a.dest != 'help'])
def test_every_option_is_read_somewhere(dest):
    assert dest in READ


def test_only_what_is_never_supported_is_read_for_the_sake_of_refusing_it_alone():
    (refusing,) = [
        n for n in ast.walk(TREES['arguments.py']) if getattr(n, 'name', '') == 'find_contradictions'
    ]  # fmt: skip
    trees = [ast.parse(ast.unparse(tree)) for tree in TREES.values()]
    for tree in trees:
        tree.body = [node for node in tree.body if getattr(node, 'name', '') != 'find_contradictions']
    elsewhere = set().union(read_by_timm(), *map(names_read, trees))
    assert names_read(refusing) - elsewhere == {'drop_connect', 'local_rank'}


# what contradicts

CONTRADICTIONS = [
    ('--coretune --torchscript', '--torchscript: the Core-tuning step cannot be scripted'),
    ('--coretune --jsd-loss --aug-splits 2', '--jsd-loss, --bce-loss: with --coretune'),
    ('--coretune --bce-loss', '--jsd-loss, --bce-loss: with --coretune'),
    ('--coretune --kd-model-name resnet18', '--kd-model-name: distillation and --coretune'),
    ('--drop-connect 0.1', "--drop-connect: timm's own script reads it nowhere; use --drop-path"),
    ('--local_rank 1', '--local_rank: processes are started by accelerate launch'),
    ('--local-rank 1', '--local_rank: processes are started by accelerate launch'),
    ('--device cuda:1', '--device: cpu or cuda'),
    ('--device gpu', '--device: cpu or cuda'),
    ('--amp --model-dtype bfloat16', '--amp needs --model-dtype float32'),
    ('--torchscript --torchcompile', '--torchscript: not with --torchcompile'),
    ('--torchscript --sync-bn', '--torchscript: not with --torchcompile, --sync-bn'),
    ('--torchscript --freeze-epochs 1', '--torchscript: not with --torchcompile'),
    ('--torchscript --head-lr-scale 2', '--torchscript: not with --torchcompile'),
    ('--aug-splits 1', '--aug-splits: a split of 1 makes no sense'),
    ('--jsd-loss', '--jsd-loss needs --aug-splits'),
    ('--split-bn', '--split-bn needs --aug-splits of 2 or more, or --resplit'),
    ('--split-bn --resplit --sync-bn', '--split-bn and --sync-bn exclude each other'),
    ('--aug-splits 2 --mixup 0.2', '--aug-splits: not with pixel mixup or --no-prefetcher'),
    ('--aug-splits 2 --no-prefetcher', '--aug-splits: not with pixel mixup or --no-prefetcher'),
    ('--aug-splits 2 --cutmix-minmax 0.2 0.8', '--aug-splits: not with pixel mixup or --no-prefetcher'),
    ('--naflex-loader --train-img-sizes 32', '--naflex-loader and --train-img-sizes are alternatives'),
    ('--naflex-loader --use-multi-epochs-loader', '--naflex-loader: not with --use-multi-epochs-loader'),
    ('--naflex-loader --aug-splits 2', '--naflex-loader: not with --use-multi-epochs-loader'),
    ('--naflex-loader --aug-repeats 3', '--naflex-loader: not with --use-multi-epochs-loader'),
    ('--naflex-loader --class-balance', '--naflex-loader: not with --use-multi-epochs-loader'),
    ('--naflex-patch-size-probs 0.5 0.5', '--naflex-patch-size-probs must be as many'),
    ('--naflex-patch-sizes 8 16 --naflex-patch-size-probs 1', '--naflex-patch-size-probs must be as many'),
    ('--train-img-sizes 32 48 --train-batch-sizes 8', '--train-batch-sizes and --train-size-probs must be as many'),
    ('--train-size-probs 0.5', '--train-batch-sizes and --train-size-probs must be as many'),
    ('--train-img-sizes 32 --use-multi-epochs-loader', '--train-img-sizes: not with'),
    ('--train-img-sizes 32 --aug-splits 2', '--train-img-sizes: not with'),
    ('--train-img-sizes 32 --class-balance', '--train-img-sizes: not with'),
    ('--class-balance --aug-repeats 3', '--class-balance and --aug-repeats both order the images'),
    ('--class-balance -b 3', '--class-balance needs a --batch-size of 4 or more'),
    ('--segmentation --mixup 0.2', '--segmentation: not with --mixup, --cutmix, --cutmix-minmax'),
    ('--segmentation --cutmix 1', '--segmentation: not with --mixup, --cutmix, --cutmix-minmax'),
    ('--segmentation --cutmix-minmax 0.2 0.8', '--segmentation: not with --mixup, --cutmix, --cutmix-minmax'),
    ('--segmentation --aug-splits 2', '--segmentation: not with --mixup, --cutmix, --cutmix-minmax'),
    ('--segmentation --aug-repeats 3', '--segmentation: not with --mixup, --cutmix, --cutmix-minmax'),
    ('--segmentation --epoch-repeats 2', '--segmentation: not with --mixup, --cutmix, --cutmix-minmax'),
    ('--segmentation --class-balance', '--segmentation: not with --mixup, --cutmix, --cutmix-minmax'),
    ('--segmentation --naflex-loader', '--segmentation: not with --mixup, --cutmix, --cutmix-minmax'),
    ('--segmentation --train-img-sizes 32', '--segmentation: not with --mixup, --cutmix, --cutmix-minmax'),
    ('--segmentation --use-multi-epochs-loader', '--segmentation: not with --mixup, --cutmix, --cutmix-minmax'),
    ('--segmentation --tta 2', '--segmentation: not with --mixup, --cutmix, --cutmix-minmax'),
    ('--segmentation --aa rand-m5', '--segmentation: --aa, --reprob, --grayscale-prob'),
    ('--segmentation --reprob 0.2', '--segmentation: --aa, --reprob, --grayscale-prob'),
    ('--segmentation --grayscale-prob 0.1', '--segmentation: --aa, --reprob, --grayscale-prob'),
    ('--segmentation --gaussian-blur-prob 0.1', '--segmentation: --aa, --reprob, --grayscale-prob'),
    ('--segmentation --color-jitter-prob 0', '--segmentation: --aa, --reprob, --grayscale-prob'),
    ('--segmentation --bce-loss', '--segmentation: not with --jsd-loss, --bce-loss'),
    ('--segmentation --kd-model-name resnet18', '--segmentation: not with --jsd-loss, --bce-loss'),
    ('--segmentation --torchscript', '--segmentation: not with --jsd-loss, --bce-loss'),
    ('--segmentation --split-bn --resplit', '--segmentation: not with --jsd-loss, --bce-loss'),
    ('--segmentation --gp avg', '--segmentation: no part in it have --gp, --drop'),
    ('--segmentation --drop 0.1', '--segmentation: no part in it have --gp, --drop'),
    ('--segmentation --head-init-scale 0', '--segmentation: no part in it have --gp, --drop'),
    ('--segmentation --head-init-bias 0', '--segmentation: no part in it have --gp, --drop'),
    ('--segmentation --crop-pct 0.9', '--segmentation: no part in it have --gp, --drop'),
    ('--segmentation --train-crop-mode rkrc', '--segmentation: no part in it have --gp, --drop'),
    ('--segmentation --train-num-samples 0', '--segmentation: no part in it have --gp, --drop'),
    ('--segmentation --val-num-samples 9', '--segmentation: no part in it have --gp, --drop'),
    ('--segmentation --dataset-trust-remote-code', '--segmentation: no part in it have --gp, --drop'),
    ('--segmentation --interpolation lanczos', '--segmentation: --interpolation and --train-interpolation'),
    ('--segmentation --train-interpolation hamming', '--segmentation: --interpolation and --train-interpolation'),
    ('--segmentation --metrics per-class', '--segmentation: --metrics are those of images'),
    ('--segmentation-head fcn', '--segmentation-head and --reduce-zero-label need --segmentation'),
    ('--reduce-zero-label', '--segmentation-head and --reduce-zero-label need --segmentation'),
    ('--segmentation --anchors-per-image 0', '--anchors-per-image: 1 or more'),
    ('--wandb-resume-id x', '--wandb-resume-id needs --resume'),
    ('--label-fraction 0', '--label-fraction: above 0, at most 1'),
    ('--label-fraction 1.1', '--label-fraction: above 0, at most 1'),
    ('--head-lr-scale 0', '--head-lr-scale: above 0'),
    ('--freeze-epochs -1', '--freeze-epochs: 0 or more'),
    ('--patience 0', '--patience: 1 or more'),
    ('--push-to-hub name', '--push-to-hub: OWNER/NAME'),
    ('--push-to-hub me/name --eval-only', '--push-to-hub pushes what was trained'),
    ('--hub-private', '--hub-private and --hub-revision need --push-to-hub'),
    ('--eval-only --val-split=', '--eval-only needs a --val-split'),
    ('--epochs 0 --val-split=', '--eval-only needs a --val-split'),
    ('--metrics confusion,f1', '--metrics: choose from confusion, per-class, ece'),
    ('--eval-metric accuracy', '--eval-metric: choose from loss, top1, top5\n'),
    ('--eval-metric ece', '--eval-metric: choose from loss, top1, top5\n'),
    ('--eval-metric f1 --metrics ece,per-class', '--eval-metric: choose from loss, top1, top5, ece, macro_f1'),
    ('--segmentation --eval-metric top1', '--eval-metric: choose from loss, miou, pa, mpa, fwiou\n'),
    ('--resume auto', '--resume auto needs --experiment NAME'),
]


@pytest.fixture
def no_launcher(monkeypatch):
    monkeypatch.delenv('LOCAL_RANK', raising=False)


@pytest.mark.parametrize('line, message', CONTRADICTIONS, ids=[line for line, _ in CONTRADICTIONS])
def test_a_contradiction_is_named_with_its_flags(capsys, no_launcher, line, message):
    with pytest.raises(SystemExit) as stopped:
        parse_args(line.split())
    assert stopped.value.code == 2
    assert f'train.py: error: {message}' in capsys.readouterr().err


def test_every_contradiction_has_a_command_line_above(no_launcher):
    found = set()
    for line, _ in CONTRADICTIONS:
        args = PARSER.parse_args(line.split())
        args.eval_only = args.eval_only or args.epochs == 0
        found |= {sentence.partition(' from ')[0] for sentence in find_contradictions(args)}  # one with any choices
    (table,) = [n for n in ast.walk(TREES['arguments.py']) if isinstance(n, ast.Dict) and len(n.keys) > 10]
    assert len(found) == len(table.keys)


@pytest.mark.parametrize(
    'line',
    [
        '--data-dir d --model resnet50 --sched cosine --epochs 150 --warmup-epochs 5 --lr 0.4 --reprob 0.5 '
        '--remode pixel --batch-size 256 --amp -j 4 --opt lamb --weight-decay 0.02 --aa rand-m7-mstd0.5-inc1 --mixup '
        '0.1 --cutmix 1.0 --smoothing 0 --bce-loss --drop-path 0.05 --model-ema --clip-grad 1 --train-interpolation '
        'random --crop-pct 0.95 --channels-last --pin-mem',
        '--aug-splits 3 --aa rand-m9-mstd0.5-inc1 --resplit --split-bn --jsd-loss --dist-bn reduce',
        '--coretune --mixup 0.2 --no-prefetcher --class-balance --metrics ece,per-class --eval-metric '
        'ece --resume auto --experiment x --torchcompile',
        '--device cpu --amp --amp-dtype bfloat16 --model-dtype float32 --torchscript --val-split=',
        '--segmentation --coretune --segmentation-head fpn --eval-metric fwiou --scale 0.5 1 --ratio 1 1 --vflip 0.5 '
        '--color-jitter 0.2 --train-interpolation bilinear --interpolation bicubic --model-ema --class-map names.txt '
        '--freeze-epochs 1 --label-fraction 0.5 --torchcompile --no-aug --reduce-zero-label',
    ],
    ids=['resnet50', 'augmix', 'coretune', 'torchscript', 'segmentation'],
)
def test_flags_that_go_together_are_taken(line):
    parse_args(line.split())


def test_a_launched_process_may_have_a_local_rank(monkeypatch):
    monkeypatch.setenv('LOCAL_RANK', '1')
    assert parse_args(['--local_rank', '1']).args.local_rank == 1


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
        ('preset: resnet\n', "argument --preset: 'resnet' in the config, choose from cnn, vit"),
    ],
    ids=['dash', 'two', 'preset'],
)
def test_an_unknown_key_of_a_config_is_refused(tmp_path, capsys, text, message):
    (tmp_path / 'config.yaml').write_text(text)
    with pytest.raises(SystemExit):
        parse_args(['-c', str(tmp_path / 'config.yaml')])
    assert message in capsys.readouterr().err


# what wins


def preset(name):
    return yaml.safe_load((PACKAGE / 'assets' / f'preset_{name}.yaml').read_text())


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
    assert [parse_args(line).args.epochs for line, _ in levels] == [epochs for _, epochs in levels]
    assert parse_args(['-c', str(config)]).args.layer_decay == preset('vit')['layer_decay']


@pytest.mark.parametrize('name', PRESETS)
def test_a_preset_sets_known_options_to_values_they_take(name):
    values = preset(name)
    line = []
    for key, value in values.items():
        action = ACTIONS[f'--{key.replace("_", "-")}']
        assert action.dest == key
        line += [action.option_strings[0]]
        line += [] if value is True else [str(v) for v in (value if isinstance(value, list) else [value])]
    spelled = vars(parse_args(['--data-dir', '.', *line]).args)
    args = vars(parse_args(['--data-dir', '.', '--preset', name]).args)
    assert args == {**spelled, 'preset': name}
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
    assert parse_args(line).args.lr == lr


SEGMENTATION_RECIPE = yaml.safe_load((PACKAGE / 'assets' / 'sample_segmentation.yaml').read_text())


def test_segmentation_alone_takes_the_recipe_of_the_scenes():
    parsed = parse_args(['--segmentation'])
    paths = {key: str(PACKAGE / 'assets' / SEGMENTATION_RECIPE[key]) for key in ('data_dir', 'pretrained_path')}
    taken = {key: getattr(parsed.args, key) for key in SEGMENTATION_RECIPE}
    assert taken == {**SEGMENTATION_RECIPE, **paths}
    assert (parsed.args.epochs, parsed.args.eval_metric) == (8, 'miou')
    assert 'scenes made of the bundled Fashion-MNIST sample with its recipe' in parsed.assumed


def test_segmentation_with_a_named_model_leaves_out_what_fits_that_of_the_recipe_alone():
    args = parse_args(['--segmentation', '--model', 'resnet50']).args
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
    assert parse_args(line).args.eval_metric == metric


def test_segmentation_in_a_config_works_as_the_flag_does(tmp_path):
    config = tmp_path / 'config.yaml'
    config.write_text('segmentation: true\nepochs: 3\n')
    flags = vars(parse_args(['--segmentation', '--epochs', '3']).args)
    assert vars(parse_args(['-c', str(config)]).args) == {**flags, 'config': str(config)}


def test_help_names_every_flag_and_says_something_of_each(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_args(['--help'])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert [a.dest for a in PARSER._actions if not (a.help or '').strip()] == []
    assert [name for name in ACTIONS if name not in text] == []


# docs/flags.md


def table(heading):
    """Rows of the table under a heading of docs/flags.md."""
    text = (ROOT / 'docs' / 'flags.md').read_text().partition(f'\n## {heading}\n')[2].partition('\n## ')[0]
    rows = [[cell.strip() for cell in line.strip('|').split(' | ')] for line in text.splitlines() if line[:1] == '|']
    assert len(rows) > 2
    assert len({len(row) for row in rows}) == 1
    return rows[2:]


def flags_in(text):
    return set(re.findall(r'(?<![\w-])--?[a-zA-Z][\w-]*', text))


DIFFERING = [row[0].strip('`').split('/')[-1] for row in table('timm flags that differ')]
ELSEWHERE = {'--mixed_precision', '--gpu_ids', '--num_processes'}  # of accelerate launch


def test_the_docs_name_no_flag_that_is_not_there():
    text = (ROOT / 'docs' / 'flags.md').read_text()
    quoted = set().union(*map(flags_in, re.findall(r'`[^`]*`', text)))
    assert quoted - set(ACTIONS) - ELSEWHERE - {'--kd-', '--naflex-'} == set()
    assert len(quoted) > 60


def test_the_flags_that_differ_are_those_of_timm_with_a_line_each():
    assert set(DIFFERING) <= TIMM_NAMES
    assert len(set(DIFFERING)) == len(DIFFERING)


def test_a_flag_of_timm_that_may_be_refused_stands_among_those_that_differ():
    (conditions,) = [n for n in ast.walk(TREES['arguments.py']) if isinstance(n, ast.Dict) and len(n.keys) > 10]
    sentences = [''.join(p.value for p in ast.walk(key) if isinstance(p, ast.Constant)) for key in conditions.keys]
    # what comes after the semicolon is what to use instead
    refused = set().union(*(flags_in(sentence.partition(';')[0]) for sentence in sentences)) & TIMM_NAMES
    assert len(refused) > 20
    assert refused - set(DIFFERING) == set()


def test_a_flag_with_fewer_choices_than_in_timm_stands_among_those_that_differ():
    narrowed = {o['flags'][-1] for o in TIMM_OPTIONS if ACTIONS[o['flags'][0]].choices and 'choices' not in o}
    assert narrowed == {'--amp-dtype', '--model-dtype', '--clip-mode', '--lr-base-scale', '--mixup-mode'} | {
        '--worker-seeding'
    }
    assert narrowed - set(DIFFERING) == set()


def test_the_table_of_our_own_flags_is_the_parser():
    expected = {}
    for action in OWN_ACTIONS:
        word = {False: 'off', None: 'none', '': 'none'}.get(action.default) if not action.default else None
        word = word if type(action.default) in (bool, str, type(None)) else None
        expected[action.option_strings[0]] = word or str(action.default)
    rows = table('Flags of our own')
    assert {row[0].strip('`'): row[1] for row in rows} == expected
    assert len(rows) == len(OWN_ACTIONS)
    assert all(row[2] for row in rows)


def test_the_table_of_presets_is_the_files():
    rows = table('Presets')
    for column, name in enumerate(PRESETS, start=1):
        shown = {row[0].strip('`'): yaml.safe_load(row[column]) for row in rows if row[column] != '-'}
        assert shown == preset(name)
