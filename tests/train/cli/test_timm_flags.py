"""timm's flags and ours: all are known, and none is accepted and ignored"""

import argparse
import ast

import pytest
from paths import ROOT
from timm.data import resolve_data_config
from timm.optim import optimizer_kwargs
from timm.scheduler import scheduler_kwargs
from timm.utils import ParseKwargs
from train_flags import ACTIONS, OWN_ACTIONS, PARSER, TIMM_NAMES, TIMM_OPTIONS, TREES


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


READ = set().union(read_by_timm(), *map(names_read, TREES.values()))


@pytest.mark.parametrize('dest', [a.dest for a in PARSER._actions if a.dest != 'help'])
def test_every_option_is_read_somewhere(dest):
    assert dest in READ


def test_only_what_is_never_supported_is_read_for_the_sake_of_refusing_it_alone():
    (refusing,) = [
        n for n in ast.walk(TREES['cli/arguments.py']) if getattr(n, 'name', '') == 'find_contradictions'
    ]  # fmt: skip
    trees = [ast.parse(ast.unparse(tree)) for tree in TREES.values()]
    for tree in trees:
        tree.body = [node for node in tree.body if getattr(node, 'name', '') != 'find_contradictions']
    elsewhere = set().union(read_by_timm(), *map(names_read, trees))
    assert names_read(refusing) - elsewhere == {'drop_connect', 'local_rank'}
