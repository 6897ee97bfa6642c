"""A run that is killed at a file event and continued ends as one that was not"""

import sys

import pytest
from paths import ROOT


@pytest.mark.slow
def test_a_run_that_is_killed_at_a_file_event_of_each_kind_ends_as_an_unbroken_one(launch):
    finished = launch([sys.executable, ROOT / 'benchmarks' / 'kill_points.py', '--points', 6])
    rows = [line.strip('| ').split(' | ') for line in finished.stdout.splitlines() if line.startswith('| a ')]
    assert len(rows) == 6
    assert all(int(tried) == int(same) >= 1 for _, _, tried, same in rows)
