"""The sums that streaming backends compute, from whole matrices in float64 and by autograd"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F


def labels_of(count, kind, left_out=True):
    """Sorted class indices: of a few large classes, of one class, or all different. Some are left out."""
    label = {
        'few': torch.randint(0, 4, (count,)) * 1000,
        'one': torch.zeros(count, dtype=torch.int64),
        'different': torch.arange(count),
    }[kind]
    if left_out and count > 2:
        label[torch.randperm(count)[: count // 5 + 1]] = -1
    return label.sort().values


def pairs_of(num_rows, num_columns, width, kind='few', dtype=torch.float64, left_out=True, same=False, disjoint=False):
    """Rows and columns of one global batch, as a backend gets them.

    Rows are the first columns and then other images, all of them columns (same), or none of them (disjoint).
    """
    count = num_columns if same else num_rows + num_columns
    unit = F.normalize(torch.randn(count, width, dtype=torch.float64), dim=1)
    label = labels_of(count, kind, left_out)
    place = torch.randperm(count)
    column = torch.randperm(count)[:num_columns].sort().values
    is_column = torch.zeros(count, dtype=torch.bool).index_fill(0, column, True)
    shared = num_rows if same else 0 if disjoint else min(num_rows, num_columns)
    row = torch.cat([column[:shared], (~is_column).nonzero().flatten()[: num_rows - shared]]).sort().values
    pairs = SimpleNamespace(
        rows=unit[row].to(dtype),
        columns=unit[column].to(dtype),
        row_place=place[row],
        column_place=place[column],
        row_label=label[row],
        column_label=label[column],
    )
    run = [torch.searchsorted(pairs.column_label, pairs.row_label, right=right) for right in (False, True)]
    pairs.row_run = torch.stack(run, dim=1).masked_fill((pairs.row_label < 0)[:, None], 0)
    return pairs


def dense(pairs, scale, focal, extras=True):
    """What a backend should return, and the statistics that it gets, in float64.

    Each row may have an extra positive and an extra negative. Their products are no concern of the backend.
    """
    rows, columns = (tensor.double().requires_grad_() for tensor in (pairs.rows, pairs.columns))
    count = columns.shape[0]
    takes_part = pairs.row_label >= 0
    other = pairs.row_place[:, None] != pairs.column_place
    positive = (pairs.row_label[:, None] == pairs.column_label) & other & takes_part[:, None]
    z = (rows @ columns.T * scale).masked_fill(~(other & (pairs.column_label >= 0)), float('-inf'))
    log_sum = z.detach().logsumexp(dim=1)
    if extras:
        z = torch.cat([z, torch.randn(len(rows), 2).to(z) * scale / 3], dim=1)
        positive = torch.cat([positive, takes_part[:, None], torch.zeros_like(takes_part)[:, None]], dim=1)
    log_p = z.masked_fill(z.isneginf().all(dim=1, keepdim=True), 0.0).log_softmax(dim=1).masked_fill(~positive, -1.0)
    loss = -(1 - log_p.exp()) * log_p if focal else -log_p
    slope = torch.autograd.grad(loss.sum(), log_p, retain_graph=True)[0].masked_fill(~positive, 0.0)
    loss = loss.masked_fill(~positive, 0.0)
    total = positive.sum(dim=1).clamp(min=1)
    upstream = torch.randn(len(rows)).to(z).masked_fill(~takes_part, 0.0)
    d_rows, d_columns = torch.autograd.grad((upstream * loss.sum(dim=1) / total).sum(), (rows, columns))
    a = upstream / total * scale
    lse = z.detach().logsumexp(dim=1).masked_fill(~takes_part, 0.0)
    return SimpleNamespace(
        log_sum=log_sum,
        lse=lse,
        stats=(lse, a, a * slope.sum(dim=1)),
        loss_sum=loss.detach()[:, :count].sum(dim=1),
        slope_sum=slope[:, :count].sum(dim=1),
        d_rows=d_rows,
        d_columns=d_columns,
    )


def errors(backend, pairs, scale, focal=True, extras=True):
    """Of each function of a backend. The gradient is for rows as anchors, as candidates and, if they can, as both."""
    dtype = torch.float64 if pairs.rows.dtype == torch.float64 else torch.float32
    expected = dense(pairs, scale, focal, extras)
    stats = tuple(stat.to(dtype) for stat in expected.stats)
    places = pairs.row_place, pairs.column_place
    labels = pairs.row_label, pairs.column_label
    anchors = (pairs.rows, pairs.columns, *places, *labels, scale, focal)
    candidates = (pairs.columns, pairs.rows, *places[::-1], *labels[::-1], scale, focal)
    sums = backend.positive_sums(
        pairs.rows, pairs.columns, *places, pairs.row_run, scale, expected.lse.to(dtype), focal
    )
    found = {
        'log_sum': (backend.log_sum(pairs.rows, pairs.columns, *places, labels[1], scale), expected.log_sum),
        'loss_sum': (sums[0], expected.loss_sum),
        'slope_sum': (sums[1], expected.slope_sum),
        'd_rows': (backend.gradient(*anchors, stats, None), expected.d_rows),
        'd_columns': (backend.gradient(*candidates, None, stats), expected.d_columns),
    }
    if torch.equal(*places):
        found['d_both'] = (backend.gradient(*anchors, stats, stats), expected.d_rows + expected.d_columns)
    assert all(result.dtype == dtype for result, _ in found.values())
    # a gradient may be a difference of equal terms, such as that of an image with one candidate
    size = expected.stats[1].abs().max().item()
    return {name: error(*values, size if name.startswith('d_') else 0.0) for name, values in found.items()}


def error(found, expected, size=0.0):
    """Largest difference, relative to the largest number or to size, if that is larger.

    inf if anything is not finite that should be.
    """
    assert found.shape == expected.shape
    found = found.double()
    infinite = expected.isneginf()
    found, expected = found.masked_fill(infinite & found.isneginf(), 0.0), expected.masked_fill(infinite, 0.0)
    if not found.isfinite().all():
        return float('inf')
    size = max(size, expected.abs().max().item())
    return (found - expected).abs().max().item() / (size or 1.0)
