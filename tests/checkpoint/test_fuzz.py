"""Checkpoints that are damaged at random are loaded, or refused in one sentence"""

import sys

import pytest
from fuzz_checkpoints import RIGHT, run_cases, table

CASES = 250


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='memory is read from /proc, and processes are forked')
def test_damaged_checkpoints_are_loaded_or_refused_in_one_sentence():
    outcomes = run_cases(range(CASES))
    wrong = [outcome for outcome in outcomes if outcome.result not in RIGHT]
    assert not wrong, '\n'.join([table(outcomes), *map(str, wrong)])
    assert len(outcomes) == CASES
    counts = {result: sum(outcome.result == result for outcome in outcomes) for result in RIGHT}
    assert min(counts.values()) > CASES // 5, counts  # the damage is neither always fatal nor always harmless
    assert len({(outcome.kind, outcome.damage) for outcome in outcomes}) > 50
