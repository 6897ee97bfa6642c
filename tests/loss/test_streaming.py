"""The contrast of large batches, block by block: against loops and the whole matrix, compiled, and in little memory"""

from typing import NamedTuple, Optional

import memory
import pytest
import torch
from reference import generator, random_features, random_label

from timm_coretune import FocalSupConLoss
from timm_coretune.loss import focal_supcon, streaming
from timm_coretune.loss.parts import score_blocks
from timm_coretune.loss.parts.dense_contrast import dense_contrast
from timm_coretune.loss.streaming import streaming_contrast
from timm_coretune.mining import normalize

WIDTH = 5
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


class Case(NamedTuple):
    """What is contrasted, in float64."""

    label: torch.Tensor
    anchor: Optional[slice] = None  # all rows
    extras: str = 'none'
    temperature: float = 0.1
    focal: bool = True

    def inputs(self, dtype=torch.float64):
        """unit, unit_positive and unit_negative in a dtype, and which anchors have a negative."""
        num_rows, num_anchors = len(self.label), len(self.label[self.rows])
        unit = normalize(random_features(7, num_rows, WIDTH))
        positive, negative = normalize(random_features(8, 2 * num_anchors, WIDTH)).split(num_anchors)
        has_negative = torch.rand(num_anchors, generator=generator(9)) < 0.6
        tensors = [
            unit,
            positive if 'positive' in self.extras else None,
            negative if 'negative' in self.extras else None,
        ]
        tensors = [None if x is None else x.to(dtype).requires_grad_() for x in tensors]
        return *tensors, has_negative if 'some' in self.extras else None

    @property
    def rows(self):
        return self.anchor or slice(0, len(self.label))

    def compute(self, function, inputs):
        """Loss of each anchor, and the gradients of a weighted sum of these losses for all embeddings."""
        unit, *rest = inputs
        losses = function(unit, self.label, self.rows, *rest, self.temperature, self.focal)
        weight = torch.randn(len(losses), dtype=torch.float64, generator=generator(3)).to(losses.dtype)
        embeddings = [x for x in inputs[:3] if x is not None]
        return losses.detach(), *torch.autograd.grad(losses, embeddings, weight)


def label_with_left_out(num_rows, num_classes):
    return random_label(5, num_rows, num_classes + 1) - 1


CASES = {
    'focal': Case(random_label(0, 23, 4)),
    'not focal': Case(random_label(0, 23, 4), focal=False),
    'both extras': Case(random_label(1, 21, 4), extras='positive negative'),
    'both extras, not focal': Case(random_label(1, 21, 4), extras='positive negative', focal=False),
    'extra positive': Case(random_label(1, 21, 4), extras='positive'),
    'extra negative': Case(random_label(1, 21, 4), extras='negative'),
    'some extra negatives': Case(random_label(1, 21, 4), extras='positive some negative'),
    'rows left out': Case(label_with_left_out(30, 3), extras='positive some negative'),
    'only one row takes part': Case(torch.tensor([-1, -1, 4, -1]), extras='negative'),
    'only one row takes part, extra positive': Case(torch.tensor([-1, -1, 4, -1]), extras='positive'),
    'all rows left out': Case(torch.full((9,), -1), extras='positive negative'),
    'local anchors': Case(label_with_left_out(40, 4), slice(11, 25), 'positive some negative'),
    'local anchors, not focal': Case(label_with_left_out(40, 4), slice(0, 13), focal=False),
    'one local anchor': Case(random_label(2, 17, 3), slice(16, 17)),
    'one class': Case(torch.full((19,), 6)),
    'all classes different': Case(torch.randperm(19, generator=generator()), extras='positive negative'),
    'all classes different, no extras': Case(torch.arange(19)),
    'one row': Case(torch.tensor([3])),
    'one row, extras': Case(torch.tensor([3]), extras='positive negative'),
    'two rows': Case(torch.tensor([3, 3])),
    'low temperature': Case(random_label(3, 22, 4), extras='positive negative', temperature=0.001),
}


def by_loops(unit, label, rows, unit_positive, unit_negative, has_negative, temperature, focal):
    """Loss of each anchor, one pair at a time."""
    losses = []
    for b, i in enumerate(range(rows.start, rows.stop)):
        pairs = [(unit[i] @ unit[j], label[j] == label[i]) for j in range(len(label)) if j != i and label[j] >= 0]
        if unit_positive is not None:
            pairs.append((unit[i] @ unit_positive[b], True))
        if unit_negative is not None and (has_negative is None or has_negative[b]):
            pairs.append((unit[i] @ unit_negative[b], False))
        loss, num_positives = 0.0 * unit[i].sum(), 0
        if label[i] >= 0:
            largest = max((score.item() for score, _ in pairs), default=0.0)
            total = sum(((score - largest) / temperature).exp() for score, _ in pairs)
            for score, is_positive in pairs:
                if is_positive:
                    log_p = (score - largest) / temperature - total.log()
                    loss = loss - ((1.0 - log_p.exp()) * log_p if focal else log_p)
                    num_positives += 1
        losses.append(loss / max(num_positives, 1))
    unused = sum(0.0 * x.sum() for x in (unit_positive, unit_negative) if x is not None)
    return torch.stack(losses) + unused


def assert_close(found, expected, tolerance):
    """Of each tensor, the difference is small against the whole of it."""
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape
        assert torch.isfinite(x).all()
        assert (x.double() - y.double()).norm() <= tolerance * y.double().norm() + 1e-13


@pytest.fixture(params=[None, 6, 90], ids=['whole', 'blocks of 6', 'blocks of 90'])
def block(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr(score_blocks, 'CPU_BLOCK', request.param)
    return request.param


# Values and gradients


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_losses_and_gradients_are_those_of_loops_and_of_the_whole_matrix(case, block):
    inputs = case.inputs()
    found = case.compute(streaming_contrast, inputs)
    assert_close(found, case.compute(by_loops, inputs), 1e-10)
    assert_close(found, case.compute(dense_contrast, inputs), 1e-10)


@pytest.mark.parametrize('name', [name for name in CASES if name != 'low temperature'])
def test_float32_is_as_exact_as_it_can_be(name, block):
    case = CASES[name]
    inputs = case.inputs(torch.float32)
    found = case.compute(streaming_contrast, inputs)
    assert {x.dtype for x in found} == {torch.float32}
    exact = [x if x is None or x.dtype == torch.bool else x.detach().double().requires_grad_() for x in inputs]
    assert_close(found, case.compute(by_loops, exact), 1e-5)


@pytest.mark.parametrize('name', ['both extras', 'local anchors'])
def test_half_precision_embeddings_are_summed_in_float32(name):
    case = CASES[name]
    inputs = case.inputs(torch.bfloat16)
    losses, *gradients = case.compute(streaming_contrast, inputs)
    exact = [x if x is None or x.dtype == torch.bool else x.detach().double().requires_grad_() for x in inputs]
    expected, *expected_gradients = case.compute(by_loops, exact)
    assert losses.dtype == torch.float32
    assert_close([losses], [expected], 1e-5)
    assert {x.dtype for x in gradients} == {torch.bfloat16}
    assert_close(gradients, expected_gradients, 2**-8)  # they are rounded once, in the end


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('num_classes', [1, 10, 1500])
def test_a_batch_of_several_blocks_is_exact(num_classes, dtype):
    case = Case(random_label(1, 1500, num_classes), extras='positive negative', temperature=0.07)
    inputs = case.inputs(dtype)
    found = case.compute(streaming_contrast, inputs)
    exact = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    assert_close(found, case.compute(dense_contrast, exact), TOLERANCE[dtype])


def test_what_left_out_rows_hold_reaches_no_other():
    case = CASES['rows left out']._replace(extras='none')
    unit = case.inputs()[0].detach()
    unit[case.label < 0] = float('nan')
    losses, gradient = case.compute(streaming_contrast, (unit.requires_grad_(), None, None, None))
    expected, expected_gradient = case.compute(by_loops, case.inputs())
    assert_close([losses, gradient], [expected, expected_gradient], 1e-10)


def test_a_row_of_nan_is_not_hidden():
    unit = CASES['focal'].inputs()[0].detach()
    unit[3] = float('nan')
    losses, gradient = CASES['focal'].compute(streaming_contrast, (unit.requires_grad_(), None, None, None))
    assert losses.isnan().all()
    assert gradient.isnan().all()


def test_autocast_touches_neither_loss_nor_gradient():
    case = CASES['both extras']
    inputs = case.inputs(torch.float32)
    expected = case.compute(streaming_contrast, inputs)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        found = case.compute(streaming_contrast, inputs)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


# The operators


@pytest.mark.parametrize('name', ['both extras', 'some extra negatives', 'local anchors', 'not focal'])
def test_the_operators_keep_the_rules_of_torch(name):
    case = CASES[name]
    unit, *rest = case.inputs()
    arguments = (unit, case.label, case.rows.start, case.rows.stop, *rest, case.temperature, case.focal)
    torch.library.opcheck(streaming._contrast, arguments)
    loss, lse, slope = (x.detach() for x in streaming._contrast(*arguments))
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    torch.library.opcheck(streaming._contrast_backward, (torch.ones_like(loss), lse, slope, *arguments))


def test_it_compiles_to_one_graph(monkeypatch):
    monkeypatch.setattr(focal_supcon, 'DENSE_BELOW', 1)
    torch._dynamo.reset()
    case = CASES['local anchors']
    inputs, label, contrast = case.inputs(), case.label, FocalSupConLoss(case.temperature)
    compiled = torch.compile(contrast.per_anchor, fullgraph=True, backend='aot_eager')
    found = case.compute(lambda unit, label, rows, *rest: compiled(unit, label, *rest[:3], rows), inputs)
    assert_close(found, case.compute(by_loops, inputs), 1e-10)
    graphs = torch._dynamo.explain(lambda x: contrast.per_anchor(x, label))(inputs[0].detach()).graphs
    nodes = [node for graph in graphs for node in graph.graph.nodes if node.op == 'call_function']
    assert [str(node.target) for node in nodes if 'getitem' not in str(node.target)] == [
        'timm_coretune.contrast.default'
    ]


def test_a_second_derivative_is_that_of_the_whole_matrix_with_one_warning(messages):
    streaming._warn_of_second_order.cache_clear()
    case = CASES['both extras']
    found = []
    for function in (streaming_contrast, dense_contrast):
        unit, positive, negative, _ = case.inputs()
        for _ in range(2):
            losses = function(unit, case.label, case.rows, positive, negative, None, case.temperature, case.focal)
            first = torch.autograd.grad(losses.square().sum(), (unit, positive, negative), create_graph=True)
            second = torch.autograd.grad(sum(x.square().sum() for x in first), (unit, positive, negative))
        found.append((*(x.detach() for x in first), *second))
    assert_close(*found, 1e-10)
    assert len(messages('WARNING')) == 1
    assert 'create_graph=True' in messages('WARNING')[0]


def test_only_the_gradients_that_are_wanted_are_kept():
    case = CASES['both extras']
    inputs = case.inputs()
    expected = case.compute(by_loops, inputs)
    unit, positive, negative, _ = (x if x is None else x.detach() for x in inputs)
    losses, gradient = case.compute(
        lambda x, *rest: streaming_contrast(unit, *rest[:2], x, negative, *rest[4:]),
        (positive.requires_grad_(), None, None, None),
    )
    assert_close([losses, gradient], [expected[0], expected[2]], 1e-10)


# Memory


def test_blocks_are_halved_while_memory_is_short_and_that_is_said_once(monkeypatch, messages):
    score_blocks._warn_of_short_memory.cache_clear()
    monkeypatch.setattr(score_blocks, 'SMALLEST_BLOCK', 16)
    case = CASES['local anchors']
    expected = case.compute(streaming_contrast, case.inputs())
    compute_block, room = score_blocks.ScoreBlocks.block, 60

    def block_with_little_memory(self, *args):
        z = compute_block(self, *args)
        if z.numel() > room:
            raise torch.OutOfMemoryError
        return z

    monkeypatch.setattr(score_blocks.ScoreBlocks, 'block', block_with_little_memory)
    assert_close(case.compute(streaming_contrast, case.inputs()), expected, 1e-12)
    assert ['no memory left for a block' in message for message in messages('WARNING')] == [True]
    room = 0
    with pytest.raises(torch.OutOfMemoryError):
        case.compute(streaming_contrast, case.inputs())


@pytest.mark.skipif(not memory.CLEAR.exists(), reason='the peak of memory is read as Linux has it')
def test_a_large_batch_stays_far_under_the_memory_of_one_matrix():
    embedding, label = torch.randn(8192, 16, requires_grad=True), torch.randint(100, (8192,))
    FocalSupConLoss()(embedding[:2048], label[:2048]).backward()
    peak = memory.peak_of(lambda: FocalSupConLoss()(embedding, label).backward())
    assert peak < 32.0  # one matrix in float32 is 256


# What is chosen


def test_the_size_of_the_matrix_chooses(monkeypatch):
    chosen = []
    for name in ('streaming_contrast', 'dense_contrast'):
        monkeypatch.setattr(focal_supcon, name, lambda *_, name=name: chosen.append(name))
    unit, label, contrast = torch.ones(2048, 1), torch.zeros(2048).long(), FocalSupConLoss()
    contrast.per_anchor(unit, label)
    contrast.per_anchor(unit, label, anchor=slice(0, 2047))
    contrast.per_anchor(unit, torch.zeros(2048, 2))  # label sets
    assert chosen == ['streaming_contrast', 'dense_contrast', 'dense_contrast']


def test_transformations_of_torch_take_the_whole_matrix(monkeypatch):
    monkeypatch.setattr(focal_supcon, 'DENSE_BELOW', 1)
    embedding, labels = random_features(3, 8, 4), torch.stack([random_label(seed, 8, 3) for seed in range(4)])
    loss = FocalSupConLoss()
    mapped = torch.func.vmap(lambda label: loss(embedding, label))(labels)
    torch.testing.assert_close(mapped, torch.stack([loss(embedding, label) for label in labels]), rtol=1e-10, atol=0)
    gradient = torch.func.grad(lambda x: loss(x, labels[0]))(embedding)
    x = embedding.clone().requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(loss(x, labels[0]), x)[0], rtol=1e-9, atol=1e-14)


def test_kernels_that_do_not_compile_are_named_once_and_blocks_take_their_place(caplog):
    pytest.importorskip('triton', reason='comes with torch on Linux')
    if torch.cuda.is_available():
        pytest.skip('kernels compile here')
    streaming._find_kernels.cache_clear()
    found = [streaming._find_kernels(torch.device('cpu'), torch.float32, 16, True) for _ in range(2)]
    assert found == [None, None]
    (warning,) = [record.message for record in caplog.records]
    assert 'The Triton kernels of the contrastive loss do not work for embeddings torch.float32 of width 16' in warning
    assert 'Error: ' in warning  # Triton's own
