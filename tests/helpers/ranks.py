"""Tests in several processes: start them, let them join, and read what they found"""

import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, List

import pytest
import torch
import torch.distributed as dist

TIMEOUT_S = 120.0


def launch_ranks(worker: str, num_processes: int, directory: Path) -> List[Any]:
    """What every rank of a worker of this folder saved. All processes end within TIMEOUT_S, by force if need be."""
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name(worker)), str(rank), str(directory)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(num_processes)
    ]
    deadline = time.monotonic() + TIMEOUT_S
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=max(deadline - time.monotonic(), 0.1))[0])
    except subprocess.TimeoutExpired:
        pytest.fail(f'{num_processes} processes did not end within {TIMEOUT_S} s; those that did wrote:\n{outputs}')
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0] * num_processes, '\n'.join(outputs)
    return [torch.load(directory / f'rank{rank}.pt') for rank in range(num_processes)]


def join_ranks(rank: int, world_size: int, directory: Path) -> None:
    """Become one of the processes that launch_ranks started."""
    dist.init_process_group(
        'gloo',
        init_method=(directory / f'init{world_size}').as_uri(),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )


def save_found(found: Any, rank: int, directory: Path) -> None:
    torch.save(found, directory / f'rank{rank}.pt')
