"""Tests of the Triton kernels by Triton's interpreter, which tests/loss/test_streaming_triton.py runs

TRITON_INTERPRET=1 must be set before Triton is imported, so these tests need a process of their own:

    TRITON_INTERPRET=1 pytest --noconftest tests/helpers/streaming_triton_cases.py
"""

import pytest
import torch
import triton
from contrast_pairs import dense, error, errors, pairs_of
from triton.runtime import interpreter

from timm_coretune.loss import streaming, streaming_triton
from timm_coretune.loss.parts.dense_contrast import dense_contrast

SCALE = 1 / 0.07
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
# weights are rounded to the dtype of embeddings before they multiply them. The interpreter cuts off bits of bfloat16
GRADIENT_LIMITS = {**LIMITS, torch.bfloat16: 2**-7, torch.float16: 2**-11}
SIZES = [(r, c, p) for p in (3, 64) for r in (1, 17, 65) for c in (1, 33, 130)]
SIZES += [(65, 33, 128), (17, 33, 256), (17, 33, 300)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
if tuple(map(int, triton.__version__.split('.')[:2])) < (3, 3):
    DTYPES = DTYPES[1:]  # tl.dot takes no float64 there


# numbers of pairs that do not exist are computed, and left out
pytestmark = pytest.mark.filterwarnings('ignore::RuntimeWarning')


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _products_of_bfloat16(monkeypatch):
    """The interpreter holds bfloat16 as integers of 16 bits, and its product multiplies those (Triton 3.8)."""
    builder = interpreter.InterpreterBuilder
    product = builder.create_dot

    def create_dot(self, a, b, *args):
        one, other = (self.cast_impl(x, triton.language.float32) if x.dtype.scalar.is_bf16() else x for x in (a, b))
        return product(self, one, other, *args)

    monkeypatch.setattr(builder, 'create_dot', create_dot)


def check(pairs, scale=SCALE, focal=True, extras=True):
    found = errors(streaming_triton, pairs, scale, focal, extras)
    limits = {name: (GRADIENT_LIMITS if name[:2] == 'd_' else LIMITS)[pairs.rows.dtype] for name in found}
    assert all(found[name] <= limits[name] for name in found), str(found)


def gradient(pairs, scale, focal, row_stats, column_stats):
    return streaming_triton.gradient(
        pairs.rows,
        pairs.columns,
        pairs.row_place,
        pairs.column_place,
        pairs.row_label,
        pairs.column_label,
        scale,
        focal,
        row_stats,
        column_stats,
    )


@pytest.mark.parametrize('num_rows, num_columns, width', SIZES)
def test_rows_and_columns_of_any_number_and_width(num_rows, num_columns, width):
    check(pairs_of(num_rows, num_columns, width, dtype=torch.float32))


def test_the_widest_embeddings():
    check(pairs_of(17, 40, streaming_triton.MAX_WIDTH, dtype=torch.bfloat16))


@pytest.mark.parametrize('dtype, width', [*((dtype, 20) for dtype in DTYPES), (DTYPES[0], 140), (torch.bfloat16, 300)])
@pytest.mark.parametrize('focal', [True, False])
def test_dtypes(dtype, width, focal):
    check(pairs_of(20, 40, width, dtype=dtype), focal=focal)


@pytest.mark.parametrize('extras', [True, False])
@pytest.mark.parametrize('kind', ['few', 'one', 'different'])
def test_all_rows_are_columns(kind, extras):
    check(pairs_of(150, 150, 64, kind, torch.float32, same=True), extras=extras)


def test_all_rows_are_columns_of_16_bits():
    check(pairs_of(150, 150, 64, dtype=torch.bfloat16, same=True))


@pytest.mark.parametrize('kind', ['few', 'one', 'different'])
def test_no_row_is_a_column(kind):
    check(pairs_of(65, 130, 32, kind, torch.float32, disjoint=True))


@pytest.mark.parametrize('extras', [True, False])
@pytest.mark.parametrize('count', [1, 2, 3])
def test_few_images(count, extras):
    check(pairs_of(count, count, 16, 'one', torch.float32, same=True), extras=extras)


def test_nobody_takes_part():
    pairs = pairs_of(40, 40, 16, same=True, dtype=torch.float32)
    pairs.row_label = pairs.column_label = torch.full((40,), -1)
    pairs.row_run = torch.zeros_like(pairs.row_run)
    check(pairs, extras=False)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('scale', [1.0, 100.0])
def test_temperatures(scale, dtype):
    check(pairs_of(50, 100, 32, dtype=dtype), scale=scale)


def test_rows_may_come_in_any_order():
    pairs = pairs_of(200, 130, 32, dtype=torch.float32)
    order = torch.randperm(200)
    for name in ('rows', 'row_place', 'row_label', 'row_run'):
        setattr(pairs, name, getattr(pairs, name)[order])
    check(pairs)


@pytest.mark.parametrize('upstream', [1e-9, 1e6])
def test_float16_holds_weights_of_any_size(upstream):
    pairs = pairs_of(40, 70, 20, dtype=torch.float16)
    expected = dense(pairs, SCALE, True)
    lse, a, b = (stat.float() for stat in expected.stats)
    found = gradient(pairs, SCALE, True, (lse, a * upstream, b * upstream), None)
    assert error(found, expected.d_rows * upstream) < 5e-4


@pytest.mark.parametrize('num_rows, num_columns', [(0, 3), (3, 0)])
def test_nothing_to_do(num_rows, num_columns):
    pairs = pairs_of(num_rows, num_columns, 8, dtype=torch.float16)
    found = streaming_triton.log_sum(
        pairs.rows, pairs.columns, pairs.row_place, pairs.column_place, pairs.column_label, SCALE
    )
    assert torch.equal(found, torch.full((num_rows,), float('-inf')))
    stats = (torch.zeros(num_rows),) * 3
    assert torch.equal(gradient(pairs, SCALE, True, stats, None), torch.zeros(num_rows, 8))


def test_results_are_the_same_each_time():
    pairs = pairs_of(65, 70, 64, dtype=torch.bfloat16)
    stats = tuple(stat.float() for stat in dense(pairs, SCALE, True).stats)
    assert torch.equal(*(gradient(pairs, SCALE, True, stats, None) for _ in range(2)))


@pytest.mark.parametrize(
    'change, message',
    [
        ({'columns': torch.zeros(7, 4)}, r'Expected rows and columns of one width.*\(7, 4\)'),
        ({'columns': torch.zeros(7, 8).bfloat16()}, r'one dtype of .*\(7, 8\) torch.bfloat16'),
        ({'rows': torch.zeros(5, 8).long(), 'columns': torch.zeros(7, 8).long()}, r'one dtype of .*torch.int64'),
        ({'rows': torch.zeros(5, 1025), 'columns': torch.zeros(7, 1025)}, 'up to 1024 numbers, got 1025. Project'),
        ({'rows': torch.zeros(8, 5).T}, r'Expected a contiguous .*\(5, 8\).* strides \(1, 5\)'),
        ({'column_label': torch.zeros(7)}, r'contiguous torch.int64 tensor on cpu, got \(7,\) torch.float32'),
    ],
)
def test_what_does_not_fit_is_an_error(change, message):
    given = {
        'rows': torch.zeros(5, 8),
        'columns': torch.zeros(7, 8),
        'row_place': torch.arange(5),
        'column_place': torch.arange(7),
        'column_label': torch.zeros(7, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        streaming_triton.log_sum(**{**given, **change}, scale=1.0)


def test_a_gradient_without_anchors_is_an_error():
    with pytest.raises(ValueError, match='got neither: there are no anchors'):
        gradient(pairs_of(3, 3, 4), SCALE, True, None, None)


@pytest.mark.parametrize('focal', [True, False])
def test_the_loss_by_kernels_is_that_of_the_whole_matrix(focal, monkeypatch):
    kernels = streaming._find_kernels(torch.device('cpu'), torch.float32, 24, focal)
    assert kernels is streaming_triton
    monkeypatch.setattr(streaming, 'backend', lambda unit, focal: kernels)
    label = torch.randint(-1, 4, (37,))
    unit, positive, negative = (
        torch.nn.functional.normalize(torch.randn(n, 24), dim=1).requires_grad_() for n in (37, 20, 20)
    )
    weight = torch.rand(20)
    arguments = (unit, label, slice(5, 25), positive, negative, torch.arange(20) % 3 > 0, 0.2, focal)
    found = streaming.streaming_contrast(*arguments)
    gradients = torch.autograd.grad(found @ weight, (unit, positive, negative))
    expected = dense_contrast(*arguments)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for x, y in zip(gradients, torch.autograd.grad(expected @ weight, (unit, positive, negative)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
