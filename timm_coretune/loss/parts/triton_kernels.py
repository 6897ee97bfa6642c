"""The kernels of `loss.streaming_triton`, where the formulas are

Each program owns BLOCK_R rows and walks over the columns, BLOCK_C at a time. Products are in units of log 2, since exp2
is the instruction that a GPU has: `scale` is the factor of the natural logarithm times log2(e), and comes as two
floats, since Triton passes floats as float32. The second one is what float32 lost, and matters for float64 only.

Sizes are no multiples of the blocks. Rows and columns beyond the end are loaded as ones that take no part.
"""

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))
# labels of what takes no part: those of columns and rows are never equal
NO_COLUMN = tl.constexpr(-2)
NO_ROW = tl.constexpr(-1)
NO_PLACE = tl.constexpr(-1)


@triton.jit
def load_tile(pointer, first, total, start, P: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Numbers start to start + BLOCK of the COUNT embeddings from first on, 0 outside."""
    index = tl.arange(0, COUNT)
    number = start + tl.arange(0, BLOCK)
    inside = (index < total - first)[:, None]
    if P % BLOCK != 0:
        inside = inside & (number < P)[None, :]
    # one offset of 64 bits, as there may be more than 2^31 numbers, and offsets inside the block of 32 bits
    pointer += tl.cast(first, tl.int64) * P
    return tl.load(pointer + index[:, None] * P + number[None, :], mask=inside, other=0.0)


@triton.jit
def load_ids(pointer, index, total, missing):
    """Labels or places at index, which fit into 32 bits."""
    return tl.load(pointer + index, mask=index < total, other=missing).to(tl.int32)


@triton.jit
def load_stats(lse_pointer, a_pointer, b_pointer, index, total):
    """Statistics of anchors, in which p becomes 0 if an anchor has no candidates."""
    lse = tl.load(lse_pointer + index, mask=index < total, other=float('inf')) * LOG2_E
    a = tl.load(a_pointer + index, mask=index < total, other=0.0)
    b = tl.load(b_pointer + index, mask=index < total, other=0.0)
    return tl.where(lse == float('-inf'), float('inf'), lse), a, b


@triton.jit
def scaled_products(
    row_tile, column_tile, rows, columns, first_row, first_column, R, C, scale, scale_rest, dtype: tl.constexpr,
    P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scaled products of all rows and columns of two blocks. Embeddings wider than BLOCK_K are read in parts."""
    product = tl.zeros((BLOCK_R, BLOCK_C), dtype)
    if P <= BLOCK_K:
        product = tl.dot(row_tile, tl.trans(column_tile), product, input_precision=PRECISION, out_dtype=dtype)
    else:
        for start in range(0, P, BLOCK_K):
            row_part = load_tile(rows, first_row, R, start, P, BLOCK_R, BLOCK_K)
            column_part = load_tile(columns, first_column, C, start, P, BLOCK_C, BLOCK_K)
            product = tl.dot(row_part, tl.trans(column_part), product, input_precision=PRECISION, out_dtype=dtype)
    if dtype == tl.float64:
        return product * scale + product * scale_rest
    return product * scale


@triton.jit(do_not_specialize=['R', 'C'])
def log_sum_kernel(
    rows, columns, row_place, column_place, column_label, out, R, C, scale, scale_rest,
    P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    dtype = out.dtype.element_ty
    first_row = tl.program_id(0) * BLOCK_R
    row = first_row + tl.arange(0, BLOCK_R)
    own_place = load_ids(row_place, row, R, NO_PLACE)
    row_tile = load_tile(rows, first_row, R, 0, P, BLOCK_R, BLOCK_K)
    largest = tl.full((BLOCK_R,), float('-inf'), dtype)
    total = tl.zeros((BLOCK_R,), dtype)
    for first_column in range(0, C, BLOCK_C):
        column = first_column + tl.arange(0, BLOCK_C)
        place = load_ids(column_place, column, C, NO_PLACE)
        label = load_ids(column_label, column, C, NO_COLUMN)
        column_tile = load_tile(columns, first_column, C, 0, P, BLOCK_C, BLOCK_P)
        z = scaled_products(
            row_tile, column_tile, rows, columns, first_row, first_column, R, C, scale, scale_rest, dtype,
            P, BLOCK_R, BLOCK_C, BLOCK_K, PRECISION,
        )  # fmt: skip
        z = tl.where((own_place[:, None] != place[None, :]) & (label >= 0)[None, :], z, float('-inf'))
        new_largest = tl.maximum(largest, tl.max(z, 1))
        # -inf as long as no column was met; then all terms are 0, not exp2(-inf + inf)
        shift = tl.where(new_largest == float('-inf'), 0.0, new_largest)
        total = total * tl.exp2(largest - shift) + tl.sum(tl.exp2(z - shift[:, None]), 1)
        largest = new_largest
    tl.store(out + row, (largest + tl.log2(total)) * LN_2, mask=row < R)


@triton.jit(do_not_specialize=['R', 'C'])
def positive_sums_kernel(
    rows, columns, row_place, column_place, row_run, lse, loss_sum, slope_sum, R, C, scale, scale_rest,
    P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, FOCAL: tl.constexpr,
):  # fmt: skip
    dtype = lse.dtype.element_ty
    first_row = tl.program_id(0) * BLOCK_R
    row = first_row + tl.arange(0, BLOCK_R)
    own_place = load_ids(row_place, row, R, NO_PLACE)
    own_lse = tl.load(lse + row, mask=row < R, other=0.0) * LOG2_E
    row_tile = load_tile(rows, first_row, R, 0, P, BLOCK_R, BLOCK_K)
    run_start = load_ids(row_run, 2 * row, 2 * R, 0)
    run_end = load_ids(row_run, 2 * row + 1, 2 * R, 0)
    # an empty run may lie anywhere, and must not make the block walk there
    first = tl.min(tl.where(run_start < run_end, run_start, C), 0)
    last = tl.max(tl.where(run_start < run_end, run_end, 0), 0)
    losses = tl.zeros((BLOCK_R,), dtype)
    slopes = tl.zeros((BLOCK_R,), dtype)
    for first_column in range(first, last, BLOCK_C):
        column = first_column + tl.arange(0, BLOCK_C)
        place = load_ids(column_place, column, C, NO_PLACE)
        column_tile = load_tile(columns, first_column, C, 0, P, BLOCK_C, BLOCK_P)
        z = scaled_products(
            row_tile, column_tile, rows, columns, first_row, first_column, R, C, scale, scale_rest, dtype,
            P, BLOCK_R, BLOCK_C, BLOCK_K, PRECISION,
        )  # fmt: skip
        in_run = (column[None, :] >= run_start[:, None]) & (column[None, :] < run_end[:, None])
        positive = in_run & (own_place[:, None] != place[None, :])
        log_p = (z - own_lse[:, None]) * LN_2
        if FOCAL:
            p = tl.exp2(z - own_lse[:, None])
            losses += tl.sum(tl.where(positive, (p - 1.0) * log_p, 0.0), 1)
            slopes += tl.sum(tl.where(positive, p * (1.0 + log_p) - 1.0, 0.0), 1)
        else:
            losses -= tl.sum(tl.where(positive, log_p, 0.0), 1)
            slopes -= tl.sum(tl.where(positive, 1.0, 0.0), 1)
    tl.store(loss_sum + row, losses, mask=row < R)
    tl.store(slope_sum + row, slopes, mask=row < R)


@triton.jit
def weigh(z, lse, a, b, positive, near, FOCAL: tl.constexpr):
    """G of anchors with these statistics. Only blocks in which positives may be (near) pay for them."""
    p = tl.exp2(z - lse)
    weight = -b * p
    if near:
        if FOCAL:
            weight += tl.where(positive, a * (p * (1.0 + (z - lse) * LN_2) - 1.0), 0.0)
        else:
            weight -= tl.where(positive, a, 0.0)
    return weight


@triton.jit(do_not_specialize=['R', 'C'])
def gradient_kernel(
    rows, columns, row_place, column_place, row_label, column_label, row_lse, row_a, row_b,
    column_lse, column_a, column_b, out, R, C, scale, scale_rest,
    P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, FOCAL: tl.constexpr, ROW_ROLE: tl.constexpr, COLUMN_ROLE: tl.constexpr,
):  # fmt: skip
    """A program makes BLOCK_P numbers of the gradient of its rows: all of them, but for wide embeddings."""
    dtype = out.dtype.element_ty
    first_number = tl.program_id(1) * BLOCK_P
    first_row = tl.program_id(0) * BLOCK_R
    row = first_row + tl.arange(0, BLOCK_R)
    own_place = load_ids(row_place, row, R, NO_PLACE)
    own_label = load_ids(row_label, row, R, NO_ROW)
    lowest = tl.min(tl.where(own_label < 0, 2147483647, own_label), 0)
    highest = tl.max(own_label, 0)
    if ROW_ROLE:
        own_lse, own_a, own_b = load_stats(row_lse, row_a, row_b, row, R)
    row_tile = load_tile(rows, first_row, R, 0, P, BLOCK_R, BLOCK_K)
    result = tl.zeros((BLOCK_R, BLOCK_P), dtype)
    for first_column in range(0, C, BLOCK_C):
        column = first_column + tl.arange(0, BLOCK_C)
        place = load_ids(column_place, column, C, NO_PLACE)
        label = load_ids(column_label, column, C, NO_COLUMN)
        column_tile = load_tile(columns, first_column, C, first_number, P, BLOCK_C, BLOCK_P)
        z = scaled_products(
            row_tile, column_tile, rows, columns, first_row, first_column, R, C, scale, scale_rest, dtype,
            P, BLOCK_R, BLOCK_C, BLOCK_K, PRECISION,
        )  # fmt: skip
        meets = (own_place[:, None] != place[None, :]) & (label >= 0)[None, :]
        z = tl.where(meets, z, float('-inf'))  # p is 0 there
        near = tl.max(((label >= lowest) & (label <= highest)).to(tl.int32), 0) > 0
        positive = meets & (own_label[:, None] == label[None, :])
        weight = tl.zeros((BLOCK_R, BLOCK_C), dtype)
        if ROW_ROLE:
            weight += weigh(z, own_lse[:, None], own_a[:, None], own_b[:, None], positive, near, FOCAL)
        if COLUMN_ROLE:
            lse, a, b = load_stats(column_lse, column_a, column_b, column, C)
            weight += weigh(z, lse[None, :], a[None, :], b[None, :], positive, near, FOCAL)
        weight = weight.to(column_tile.dtype)
        result = tl.dot(weight, column_tile, result, input_precision=PRECISION, out_dtype=dtype)
    number = first_number + tl.arange(0, BLOCK_P)
    result = tl.where((own_label >= 0)[:, None], result, 0.0)
    out += tl.cast(first_row, tl.int64) * P
    offset = tl.arange(0, BLOCK_R)[:, None] * P + number[None, :]
    tl.store(out + offset, result, mask=(row < R)[:, None] & (number < P)[None, :])
