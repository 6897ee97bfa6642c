"""docs/flags.md says of the flags what the parser does"""

import ast
import re

import document_flags
import yaml
from paths import ROOT
from train_flags import ACTIONS, OWN_ACTIONS, TIMM_NAMES, TIMM_OPTIONS, TREES, preset

from timm_coretune.train.cli.arguments import PRESETS


def table(heading):
    """Rows of the table under a heading of docs/flags.md."""
    text = (ROOT / 'docs' / 'flags.md').read_text().partition(f'\n## {heading}\n')[2].partition('\n## ')[0]
    rows = [[cell.strip() for cell in line.strip('|').split(' | ')] for line in text.splitlines() if line[:1] == '|']
    assert len(rows) > 2
    assert len({len(row) for row in rows}) == 1
    return rows[2:]


def flags_in(text):
    return set(re.findall(r'(?<![\w-])--?[a-zA-Z][\w-]*', text))


NOTES = yaml.safe_load((ROOT / 'docs' / 'flags_notes.yaml').read_text())
DIFFERING = [flag for flag, note in NOTES.items() if isinstance(note, dict)]

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
    tables = [n for n in ast.walk(TREES['cli/conflicts.py']) if isinstance(n, ast.Dict)]
    keys = [key for table in tables for key in table.keys if key is not None]
    sentences = [''.join(p.value for p in ast.walk(key) if isinstance(p, ast.Constant)) for key in keys]
    # what comes after the semicolon is what to use instead
    refused = set().union(*(flags_in(sentence.partition(';')[0]) for sentence in sentences)) & TIMM_NAMES
    assert len(refused) > 20
    assert refused - set(DIFFERING) == set()


def test_a_flag_with_fewer_choices_than_in_timm_stands_among_those_that_differ():
    narrowed = {o['flags'][-1] for o in TIMM_OPTIONS if ACTIONS[o['flags'][0]].choices and 'choices' not in o}
    assert narrowed == {'--amp-dtype', '--model-dtype', '--clip-mode', '--lr-base-scale', '--mixup-mode'} | {
        *('--worker-seeding', '--dist-bn', '--loss')
    }
    assert narrowed - set(DIFFERING) == set()


def test_the_tables_are_what_the_script_writes():
    page = (ROOT / 'docs' / 'flags.md').read_text()
    assert document_flags.replace_tables(page) == page
    for name in ACTIONS.keys() - {'-h', '--help', 'data'}:
        assert f'`{name}`' in page


def test_a_note_is_of_a_flag_and_says_both_sides_where_it_differs_from_timm():
    assert set(NOTES) <= set(ACTIONS)
    for flag in DIFFERING:
        assert set(NOTES[flag]) == {'in timm', 'here'}
    assert {flag for flag in NOTES if flag not in DIFFERING} <= {a.option_strings[0] for a in OWN_ACTIONS}


def test_the_table_of_presets_is_the_files():
    rows = table('Presets')
    for column, name in enumerate(PRESETS, start=1):
        shown = {row[0].strip('`'): yaml.safe_load(row[column]) for row in rows if row[column] != '-'}
        assert shown == preset(name)
