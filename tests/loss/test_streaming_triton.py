import inspect
import os
import re
import sys
from functools import partial

import pytest
import torch
from commands import ONE_THREAD, environment_with, run_command
from contrast_pairs import errors, pairs_of
from paths import ROOT

triton = pytest.importorskip('triton', reason='comes with torch on Linux')

SCALE = 1 / 0.07
MEBI = 2**20


@pytest.fixture
def backend():
    from timm_coretune.loss import streaming_triton

    return streaming_triton


@pytest.mark.slow
def test_the_kernels_in_the_interpreter_of_triton():
    """Triton must see the variable when it is imported, so the tests are in a file for another process."""
    environment = environment_with(**ONE_THREAD, TRITON_INTERPRET='1')
    environment.pop('PYTEST_ADDOPTS', None)
    words = [sys.executable, '-m', 'pytest', '--noconftest', '-p', 'no:cacheprovider', '-q', '--tb=short']
    finished = run_command([*words, 'tests/helpers/streaming_triton_cases.py'], environment, cwd=ROOT)
    assert int(re.search(r'(\d+) passed', finished.stdout)[1]) >= 60, finished.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    'kernel, capability, width, dtype, words',
    [
        ('log_sum', 90, 128, torch.bfloat16, {}),
        ('log_sum', 80, 128, torch.float32, {}),
        ('positive_sums', 90, 128, torch.float32, {'FOCAL': True}),
        ('positive_sums', 80, 300, torch.bfloat16, {'FOCAL': False}),
        ('gradient', 90, 128, torch.bfloat16, {'FOCAL': True, 'ROW_ROLE': True, 'COLUMN_ROLE': True}),
        ('gradient', 90, 256, torch.float32, {'FOCAL': True, 'ROW_ROLE': True, 'COLUMN_ROLE': False}),
        ('gradient', 80, 64, torch.float16, {'FOCAL': False, 'ROW_ROLE': False, 'COLUMN_ROLE': True}),
    ],
)
def test_the_kernels_compile_for_devices_and_use_their_tensor_cores(
    kernel, capability, width, dtype, words, tmp_path, monkeypatch
):
    """The interpreter takes code that the compiler rejects. Machine code can be made without the device."""
    compiler = pytest.importorskip('triton.compiler')
    if 'constexprs' not in inspect.signature(compiler.ASTSource).parameters or 'TRITON_INTERPRET' in os.environ:
        pytest.skip('needs Triton 3.3 or later, outside of its interpreter')
    from triton_compile import compiled

    from timm_coretune.loss.parts import triton_kernels

    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    made = compiled(getattr(triton_kernels, f'{kernel}_kernel'), capability, width, dtype, **words)
    assert ('wgmma.mma_async' if capability == 90 else 'mma.sync') in made.asm['ptx']
    assert made.metadata.shared <= {80: 99, 90: 227}[capability] * 1024  # cards of 8.6 and 8.9 have 99 KiB


def on_device(pairs):
    return type(pairs)(**{name: tensor.cuda() for name, tensor in vars(pairs).items()})


def calls(backend, pairs):
    """The three functions in a row, as a step of training calls them when all rows are anchors."""
    places, labels = (pairs.row_place, pairs.column_place), (pairs.row_label, pairs.column_label)
    lse = backend.log_sum(pairs.rows, pairs.columns, *places, labels[1], SCALE)
    sums = backend.positive_sums(pairs.rows, pairs.columns, *places, pairs.row_run, SCALE, lse, True)
    stats = (lse, torch.full_like(lse, 1e-3), torch.full_like(lse, -1e-2))
    return *sums, backend.gradient(pairs.rows, pairs.columns, *places, *labels, SCALE, True, stats, stats)


def milliseconds(function):
    for _ in range(3):
        function()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(5):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 5


@pytest.mark.gpu
@pytest.mark.parametrize(
    'dtype, width',
    [
        *((torch.float32, width) for width in (64, 128, 300)),
        *((torch.bfloat16, width) for width in (64, 128, 256, 1024)),
        (torch.float16, 128),
        (torch.float64, 128),
    ],
)
def test_results_on_the_device(dtype, width, backend):
    limit = 1e-10 if dtype == torch.float64 else 1e-5
    # weights are rounded to the dtype of embeddings before they multiply them
    gradient_limit = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, limit)
    for same in (True, False):
        found = errors(backend, on_device(pairs_of(4096, 4096, width, dtype=dtype, same=same)), SCALE)
        limits = {name: gradient_limit if name[:2] == 'd_' else limit for name in found}
        assert all(found[name] <= limits[name] for name in found), str(found)


@pytest.mark.gpu
def test_more_than_two_billion_numbers(backend):
    count = 2**21 + 40
    columns = torch.zeros(count, 1024, dtype=torch.float16, device='cuda')
    columns[-40:] = torch.nn.functional.normalize(torch.randn(40, 1024, device='cuda'), dim=1).half()
    place = torch.arange(count, device='cuda')
    label = torch.full_like(place, -1)
    label[-40:] = 0
    found = backend.log_sum(columns[-8:], columns, place[-8:], place, label, SCALE)
    z = columns[-8:].double() @ columns[-40:].double().T * SCALE
    z[torch.arange(8), torch.arange(32, 40)] = float('-inf')
    torch.testing.assert_close(found.double(), z.logsumexp(dim=1), rtol=1e-5, atol=0)


@pytest.mark.gpu
def test_memory_is_that_of_the_results(backend):
    pairs = on_device(pairs_of(32768, 32768, 128, dtype=torch.bfloat16, same=True))
    calls(backend, pairs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    calls(backend, pairs)
    gradient_bytes = 4 * pairs.rows.numel()
    assert torch.cuda.max_memory_allocated() - before <= gradient_bytes + 4 * MEBI


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_faster_than_whole_matrices(dtype, backend):
    pairs = on_device(pairs_of(16384, 16384, 128, dtype=dtype, same=True))
    whole = on_device(pairs_of(16384, 16384, 128, dtype=torch.float32, same=True))
    times = milliseconds(partial(calls, backend, pairs)), milliseconds(partial(dense_step, whole))
    print(f'\n{torch.cuda.get_device_name()}, {dtype}: {times[0]:.2f} ms, whole matrices {times[1]:.2f} ms')
    assert times[0] < times[1]


def dense_step(pairs):
    from timm_coretune.loss import FocalSupConLoss

    unit = pairs.rows.requires_grad_()
    FocalSupConLoss().per_anchor(unit, pairs.row_label).sum().backward()
    unit.grad = None


@pytest.mark.gpu
def test_a_cuda_graph_holds_all_of_it(backend):
    pairs = on_device(pairs_of(300, 300, 128, dtype=torch.float16, same=True))
    expected = calls(backend, pairs)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # waiting for the device, or tuning, is an error here
        found = calls(backend, pairs)
    graph.replay()
    assert all(map(torch.equal, found, expected))
