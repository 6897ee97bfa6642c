"""timm's flags and ours: all are known, and none is accepted and ignored"""

import argparse
import ast
import dataclasses
import inspect

import pytest
from paths import ROOT
from timm.data import resolve_data_config
from timm.loss import create_classification_loss
from timm.loss._loss_factory import LOSS_TYPES
from timm.optim import optimizer_kwargs
from timm.scheduler import scheduler_kwargs
from timm.scheduler.wsd_lr import _DECAY_FNS
from timm.utils import ParseKwargs
from train_flags import ACTIONS, OWN_ACTIONS, PACKAGE, PARSER, TIMM_NAMES, TIMM_OPTIONS, TREES

from timm_coretune.train.cli.settings import OWN_SECTIONS, Settings


def options_by_name(options):
    return [pytest.param(option, id=option['flags'][-1]) for option in options]


# what timm has


def test_the_list_of_timm_is_whole():
    assert len(TIMM_OPTIONS) == 173 + 14


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
    """Names of attributes that are read, of whatever object."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return {node.attr for node in nodes if isinstance(node.ctx, ast.Load)}


def test_the_reads_of_a_source_are_seen():
    source = """
settings.one.copy()
self.settings.two = loop.three
print('settings.four')
f'{data.five}'
"""
    assert names_read(ast.parse(source)) == {'settings', 'one', 'copy', 'three', 'five'}


READ = read_by_timm().union(*map(names_read, TREES.values()))
IN_USE = read_by_timm().union(*(names_read(tree) for file, tree in TREES.items() if file != 'cli/conflicts.py'))
NAMES = sorted(Settings().flat())


@pytest.mark.parametrize('name', NAMES)
def test_every_setting_is_read_somewhere(name):
    assert name in READ


def test_only_what_is_never_supported_is_read_for_the_sake_of_refusing_it_alone():
    assert set(NAMES) - IN_USE == {'drop_connect', 'local_rank'}


def test_every_flag_is_a_setting_but_those_that_bring_settings_from_elsewhere():
    assert {a.dest for a in PARSER._actions} - set(NAMES) == {'help', 'config', 'data', 'preset'}


def test_our_own_flags_stand_in_sections_of_their_own():
    sections = {a: group.title for group in PARSER._action_groups for a in group._group_actions}
    assert {sections[a] for a in OWN_ACTIONS} == set(OWN_SECTIONS)
    assert {a for a in PARSER._actions if sections[a] in OWN_SECTIONS} == set(OWN_ACTIONS)


def test_the_groups_are_frozen_and_hold_each_name_once():
    settings = Settings()
    groups = [getattr(settings, f.name) for f in dataclasses.fields(settings)]
    names = [f.name for group in groups for f in dataclasses.fields(group)]
    assert len(names) == len(set(names)) == len(NAMES)
    for group in (settings, *groups):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(group, dataclasses.fields(group)[0].name, None)
    assert Settings.from_flat({**settings.flat(), 'lr': 3.0, 'no_such': 1}).optimization.lr == 3.0


def test_argparse_is_known_to_the_command_line_alone():
    sources = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in (PACKAGE / 'train').rglob('*.py')}
    assert {file for file, source in sources.items() if 'argparse' in source} == {
        *('train/cli/arguments.py', 'train/cli/config_file.py', 'train/cli/flags.py', 'train/cli/settings.py'),
        'train/replay.py',  # a command of its own
    }


# what timm's factories know, the parser knows


@pytest.mark.parametrize(
    'read',
    [optimizer_kwargs, lambda cfg: scheduler_kwargs(cfg, decreasing_metric=True)],
    ids=['optimizer', 'scheduler'],
)
def test_every_argument_that_a_factory_of_timm_reads_is_a_flag(read):
    reads = _Reads(nothing=None)
    read(reads)
    names = set(dict(reads)) - {'nothing', 'opt_args', 'opt_foreach'}  # these two are no flags of timm's script
    assert len(names) > 4
    assert names - set(NAMES) == set()


# arguments of the loss factory that timm's script leaves at their defaults, or fills from other flags
NO_FLAG = {
    *('asl_gamma_pos', 'asl_gamma_neg', 'asl_clip', 'asl_reduction', 'poly_alpha', 'twoway_tp', 'twoway_tn'),
    *('db_neg_scale', 'db_init_bias', 'db_focal_gamma'),
}


def test_every_argument_of_the_loss_factory_is_given_or_known_to_have_no_flag():
    call = next(
        node for node in ast.walk(TREES['cli/criterion.py'])
        if isinstance(node, ast.FunctionDef) and node.name == 'create_criterion'
    )  # fmt: skip
    calls = [n for n in ast.walk(call) if isinstance(n, ast.Call) and ast.unparse(n.func) in ('dict', 'kwargs.update')]
    given = {keyword.arg for n in calls for keyword in n.keywords}
    assert given | NO_FLAG == set(inspect.signature(create_classification_loss).parameters)
    assert not given & NO_FLAG


def test_every_loss_decay_and_schedule_of_timm_can_be_chosen():
    assert {*LOSS_TYPES, 'coretune'} == set(ACTIONS['--loss'].choices)
    assert set(_DECAY_FNS) == set(ACTIONS['--lr-decay-fn'].choices)
    assert ACTIONS['--sched'].choices is None  # whatever the factory knows
    assert ACTIONS['--opt'].choices is None
