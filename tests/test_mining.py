"""Protects the choice of hard pairs: masks, degenerate batches, invariances and the law of the random negative"""

import memory
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import classes, generator, mine, random_features, random_label, random_soft_target, similarity
from scipy.stats import chi2

from timm_coretune import mine_hard_pairs
from timm_coretune.mining import HardPairs, hardest, normalize, select_hard_pairs
from timm_coretune.mining.label_sets import select_hard_pairs_of_sets

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
dtype_ids = [str(dtype).removeprefix('torch.') for dtype in DTYPES]


def assert_hard_pairs_are_those_of_the_reference(
    pairs: HardPairs, features: torch.Tensor, target: torch.Tensor, tolerance: float = 2e-6
) -> None:
    """Rows of equal similarity are equally right, so a choice is judged by its similarity and its class."""
    s, y = similarity(features), classes(target)
    for i, expected in enumerate(mine(features, target)):
        hp, hn, rn, has_negative = (column[i].item() for column in pairs)
        if expected.hardest_positive == i:
            assert hp == i
        else:
            assert hp != i
            assert y[hp] == y[i]
            assert s[i][hp] <= s[i][expected.hardest_positive] + tolerance
        assert has_negative == (expected.hardest_negative is not None)
        if has_negative:
            assert y[hn] != y[i]
            assert s[i][hn] >= s[i][expected.hardest_negative] - tolerance
            assert rn in expected.negatives
        else:
            assert hn == i
            assert rn == i


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    batch_size=st.integers(1, 24),
    num_classes=st.integers(1, 12),
    imbalance=st.sampled_from([0.0, 1.0, 4.0]),
    dtype=st.sampled_from(DTYPES),
    target_kind=st.sampled_from(['int32', 'int64', 'soft']),
    rectified=st.booleans(),
)
def test_hard_pairs_agree_with_loops_over_the_definition(
    seed, batch_size, num_classes, imbalance, dtype, target_kind, rectified
):
    features = random_features(seed, batch_size, 7, dtype)
    features = features.relu() if rectified else features
    if target_kind == 'soft':
        target = random_soft_target(seed, batch_size, num_classes)
    else:
        target = random_label(seed, batch_size, num_classes, imbalance).to(getattr(torch, target_kind))
    pairs = mine_hard_pairs(features, target, generator=generator(seed))
    assert [tuple(column.shape) for column in pairs] == [(batch_size,)] * 4
    assert [column.dtype for column in pairs] == [torch.int64] * 3 + [torch.bool]
    assert_hard_pairs_are_those_of_the_reference(pairs, features, target)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=['float32', 'float64'])
def test_well_separated_rows_give_exactly_the_indices_of_the_reference(dtype):
    features, label = random_features(3, 24, 16, dtype), random_label(3, 24, 5)
    pairs, expected = mine_hard_pairs(features, label), mine(features, label)
    assert pairs.hard_positive.tolist() == [row.hardest_positive for row in expected]
    assert pairs.hard_negative.tolist() == [row.hardest_negative for row in expected]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=['float16', 'bfloat16'])
def test_similarities_of_half_precision_rows_are_computed_in_float32(dtype):
    # the cosines to row 0 differ by less than half precision resolves
    features = torch.tensor([[1.0, 0.0], [1.0, 0.05], [1.0, 0.04], [1.0, 0.03], [1.0, 0.02]], dtype=dtype)
    label = torch.tensor([0, 0, 0, 1, 1])
    with torch.autocast('cpu', dtype=torch.bfloat16):
        pairs = mine_hard_pairs(features, label)
    assert pairs.hard_positive[0] == 1
    assert pairs.hard_negative[0] == 4


def test_the_most_probable_class_of_a_soft_target_is_mined():
    features, soft = random_features(5, 12, 6), random_soft_target(5, 12, 4)
    by_soft = mine_hard_pairs(features, soft, generator=generator())
    by_index = mine_hard_pairs(features, torch.tensor(classes(soft)), generator=generator())
    assert all(torch.equal(left, right) for left, right in zip(by_soft, by_index, strict=True))


def test_one_image_is_its_own_pair_and_has_no_negative():
    pairs = mine_hard_pairs(torch.ones(1, 4), torch.tensor([2]))
    assert [column.tolist() for column in pairs] == [[0], [0], [0], [False]]


def test_a_batch_of_one_class_has_positives_and_no_negative():
    features, label = random_features(0, 6, 4), torch.full((6,), 3)
    pairs = mine_hard_pairs(features, label)
    assert pairs.has_negative.tolist() == [False] * 6
    assert pairs.hard_negative.tolist() == pairs.random_negative.tolist() == list(range(6))
    assert all(hp != i for i, hp in enumerate(pairs.hard_positive.tolist()))
    assert_hard_pairs_are_those_of_the_reference(pairs, features, label)


def test_a_class_alone_in_the_batch_is_its_own_hardest_positive():
    features, label = random_features(1, 5, 4), torch.tensor([0, 0, 7, 0, 0])
    pairs = mine_hard_pairs(features, label)
    assert pairs.hard_positive[2] == 2
    assert pairs.has_negative.all()
    assert_hard_pairs_are_those_of_the_reference(pairs, features, label)


def test_images_of_all_different_classes_are_their_own_hardest_positives():
    features, label = random_features(2, 9, 4), torch.arange(9).flip(0)
    pairs = mine_hard_pairs(features, label)
    assert pairs.hard_positive.tolist() == list(range(9))
    assert_hard_pairs_are_those_of_the_reference(pairs, features, label)


@pytest.mark.parametrize('seed', range(3))
def test_five_thousand_classes_are_told_apart(seed):
    label = random_label(seed, 64, 5000)
    label[:8] = torch.tensor([4999, 4999, 4998, 4998, 4997, 0, 0, 2500])
    features = random_features(seed, 64, 8)
    pairs = mine_hard_pairs(features, label)
    assert pairs.hard_positive[:4].tolist() == [1, 0, 3, 2]
    assert_hard_pairs_are_those_of_the_reference(pairs, features, label)


@pytest.mark.parametrize('zero_rows', [[0], [1, 4], list(range(8))], ids=['one', 'two', 'all'])
def test_rows_of_zeros_have_similarity_zero_to_all_and_are_never_nan(zero_rows):
    features, label = random_features(4, 8, 4), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    features[zero_rows] = 0.0
    assert normalize(features)[zero_rows].eq(0).all()
    assert_hard_pairs_are_those_of_the_reference(mine_hard_pairs(features, label), features, label)


@pytest.mark.parametrize('dtype', DTYPES, ids=dtype_ids)
def test_duplicate_images_never_pair_with_themselves_or_across_classes(dtype):
    features = random_features(6, 4, 5, dtype).repeat(3, 1)
    label = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 1, 2, 3, 0])
    assert_hard_pairs_are_those_of_the_reference(mine_hard_pairs(features, label), features, label)


def test_the_scale_of_a_row_does_not_matter():
    features, label = random_features(7, 20, 6), random_label(7, 20, 4)
    scale = torch.logspace(-6, 6, 20, dtype=torch.float64)[:, None]
    pairs = mine_hard_pairs(features, label, generator=generator())
    scaled = mine_hard_pairs(features * scale, label, generator=generator())
    assert all(torch.equal(left, right) for left, right in zip(pairs, scaled, strict=True))


def test_permuting_the_batch_permutes_the_hard_pairs():
    features, label = random_features(8, 20, 6), random_label(8, 20, 4, imbalance=1.0)
    order = torch.randperm(20, generator=generator(1))
    rank = order.argsort()
    pairs, permuted = mine_hard_pairs(features, label), mine_hard_pairs(features[order], label[order])
    assert torch.equal(permuted.hard_positive, rank[pairs.hard_positive[order]])
    assert torch.equal(permuted.hard_negative, rank[pairs.hard_negative[order]])
    assert torch.equal(permuted.has_negative, pairs.has_negative[order])


def test_mining_some_anchors_equals_mining_all_and_keeping_those():
    features, label, draw = random_features(9, 20, 6), random_label(9, 20, 4), torch.rand(20, generator=generator())
    anchor = torch.tensor([17, 2, 5, 19])
    pairs = select_hard_pairs(features, label, draw)
    of_anchor = select_hard_pairs(features, label, draw[anchor], anchor=anchor)
    assert all(torch.equal(left[anchor], right) for left, right in zip(pairs, of_anchor, strict=True))


MINED = {
    'all': {},
    'some anchors': {'anchor': torch.arange(30, 97)},
    'candidates': {'positive_draw': torch.rand(150, 3, generator=generator(4))},
    'another order': {'order': torch.randperm(150, generator=generator(5))},
}


@pytest.mark.parametrize('block', [1, 22499])
@pytest.mark.parametrize('repeated', [False, True], ids=['no ties', 'ties'])
@pytest.mark.parametrize('kwargs', MINED.values(), ids=MINED)
@pytest.mark.parametrize(
    'dtype', [torch.float32, torch.float64, torch.bfloat16], ids=['float32', 'float64', 'bfloat16']
)
def test_mining_in_blocks_finds_the_same_pairs_to_the_last_bit(monkeypatch, block, repeated, kwargs, dtype):
    features, label = random_features(9, 150, 48, dtype), random_label(9, 150, 6) - 1
    features = features[torch.arange(150) % 20] if repeated else features
    sets = torch.rand(150, 5, generator=generator(6)).lt(0.3).float()
    draw = torch.rand(len(kwargs.get('anchor', label)), generator=generator(7))

    def mine_both():
        of_sets = select_hard_pairs_of_sets(features, sets, draw, **kwargs)
        return *select_hard_pairs(features, label, draw, **kwargs), *of_sets

    whole = mine_both()
    monkeypatch.setattr(hardest, 'BLOCK', block)
    assert all(torch.equal(left, right) for left, right in zip(mine_both(), whole, strict=True))


def test_mining_in_blocks_agrees_with_loops_and_takes_the_first_of_equals(monkeypatch):
    monkeypatch.setattr(hardest, 'BLOCK', 100)
    features, label = random_features(3, 24, 16), random_label(3, 24, 5)
    expected = mine(features, label)
    pairs = mine_hard_pairs(features, label)
    assert pairs.hard_positive.tolist() == [row.hardest_positive for row in expected]
    assert pairs.hard_negative.tolist() == [row.hardest_negative for row in expected]
    # all cosines are 0, 1 or -1
    features, label = (
        torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]).repeat(8, 1),
        torch.arange(32) % 2,
    )
    pairs = mine_hard_pairs(features, label)
    assert pairs.hard_positive.tolist() == [(2 + i) % 4 for i in range(32)]
    assert pairs.hard_negative.tolist() == [(1 + i) % 2 for i in range(32)]


@pytest.mark.skipif(not memory.CLEAR.exists(), reason='the peak of memory is read as Linux has it')
def test_mining_a_large_batch_takes_less_memory_than_one_matrix():
    features, label, draw = torch.randn(8192, 16), torch.randint(100, (8192,)), torch.rand(8192)
    select_hard_pairs(features[:99], label[:99], draw[:99])
    peak = memory.peak_of(select_hard_pairs, features, label, draw)
    assert peak < 150.0  # one matrix in float32 is 256, and there would be several


def test_mining_in_blocks_compiles_to_one_graph_of_few_nodes(monkeypatch):
    monkeypatch.setattr(hardest, 'BLOCK', 100)
    torch._dynamo.reset()
    features, label, draw = random_features(3, 60, 16), random_label(3, 60, 5), torch.rand(60, generator=generator())
    compiled = torch.compile(select_hard_pairs, fullgraph=True, backend='aot_eager')
    pairs = zip(compiled(features, label, draw), select_hard_pairs(features, label, draw), strict=True)
    assert all(torch.equal(left, right) for left, right in pairs)
    assert len(torch._dynamo.explain(select_hard_pairs)(features, label, draw).graphs[0].graph.nodes) < 60
    candidates = torch.randint(60, (60, 3), generator=generator())
    for chosen in (None, candidates):
        torch.library.opcheck(hardest._hardest_in_blocks, (normalize(features), label, torch.arange(60), chosen))


@pytest.mark.parametrize(
    'label',
    [[0, 1, 2, 3, 4, 5], [2, 0, 1, 0, 2, 0, 0, 1], [1, 1, 1, 1, 0, 1], [4999, 17, 4999, 300]],
    ids=['all different', 'imbalanced', 'one against all', 'sparse labels'],
)
def test_random_negatives_are_uniform_over_the_other_classes(label):
    num_draws, label = 4000, torch.tensor(label)
    features, source = random_features(0, len(label), 4, torch.float32), generator(11)
    counts = torch.zeros(len(label), len(label))
    for _ in range(num_draws):
        rn = mine_hard_pairs(features, label, generator=source).random_negative
        counts[torch.arange(len(label)), rn] += 1
    for i, row in enumerate(mine(features, label)):
        assert counts[i].sum() == counts[i, row.negatives].sum() == num_draws
        expected = num_draws / len(row.negatives)
        statistic = ((counts[i, row.negatives] - expected) ** 2 / expected).sum().item()
        if len(row.negatives) > 1:
            assert chi2.sf(statistic, df=len(row.negatives) - 1) > 1e-4


def test_one_candidate_is_a_random_image_of_the_class_and_many_find_the_hardest():
    features, label = random_features(0, 12, 4), random_label(0, 12, 3, imbalance=1.0)
    order, rank = torch.randperm(12, generator=generator(1)), torch.rand(12, generator=generator(2))
    draw = torch.rand(12, 3000, generator=generator(3))
    chosen = torch.stack(
        [select_hard_pairs(features, label, rank, positive_draw=draw[:, i : i + 1]).hard_positive for i in range(3000)]
    )
    hardest = select_hard_pairs(features, label, rank, order=order, positive_draw=draw).hard_positive
    assert torch.equal(hardest, mine_hard_pairs(features, label).hard_positive)
    for i in range(12):
        positives = [j for j in range(12) if j != i and label[j] == label[i]] or [i]
        counts = torch.bincount(chosen[:, i], minlength=12)
        assert counts[positives].sum() == 3000
        expected = 3000 / len(positives)
        statistic = ((counts[positives] - expected) ** 2 / expected).sum().item()
        if len(positives) > 1:
            assert chi2.sf(statistic, df=len(positives) - 1) > 1e-4


@pytest.mark.parametrize('batch_size', [2, 7, 64], ids=lambda size: f'batch of {size}')
def test_the_extreme_draws_stay_inside_the_other_classes(batch_size):
    features, label = random_features(0, batch_size, 4), torch.arange(batch_size) % 3
    for draw in (0.0, 1.0 - 2**-24, 1.0):  # torch.rand stays below 1, a cast to half precision can reach it
        pairs = select_hard_pairs(features, label, torch.full((batch_size,), draw))
        assert (label[pairs.random_negative] != label).all()


def test_equal_generators_draw_equal_random_negatives_and_the_generator_advances():
    features, label = random_features(0, 64, 4), random_label(0, 64, 8)
    first, second = generator(5), generator(5)
    drawn = [mine_hard_pairs(features, label, generator=first).random_negative for _ in range(2)]
    again = [mine_hard_pairs(features, label, generator=second).random_negative for _ in range(2)]
    assert torch.equal(drawn[0], again[0])
    assert torch.equal(drawn[1], again[1])
    assert not torch.equal(drawn[0], drawn[1])


def test_without_a_generator_the_global_seed_decides():
    features, label = random_features(0, 64, 4), random_label(0, 64, 8)
    with torch.random.fork_rng(devices=[]):
        drawn = []
        for _ in range(2):
            torch.manual_seed(3)
            drawn.append(mine_hard_pairs(features, label).random_negative)
    assert torch.equal(*drawn)


def test_mining_leaves_no_graph():
    features = random_features(0, 8, 4).requires_grad_()
    pairs = mine_hard_pairs(features, random_label(0, 8, 3))
    assert not any(column.requires_grad for column in pairs)
    assert features.grad is None


@pytest.mark.parametrize(
    'features, label, message',
    [
        (torch.ones(4, 3, 2, 2), torch.zeros(4).long(), r'floating-point \(batch_size, width\) matrix.*\(4, 3, 2, 2\)'),
        (torch.ones(4), torch.zeros(4).long(), r'Pool a feature map first'),
        (torch.ones(4, 3).long(), torch.zeros(4).long(), r'floating-point.*torch\.int64'),
        (torch.ones(4, 3), torch.zeros(5).long(), r'class indices \(4,\).*got \(5,\).*same batch'),
        (torch.ones(4, 3), torch.zeros(4, 3, 1), r'soft targets \(4, num_classes\).*got \(4, 3, 1\)'),
        (torch.ones(4, 3), torch.tensor(1), r'class indices \(4,\)'),
        (torch.ones(4, 3), torch.zeros(4), r'integer dtype, got torch\.float32.*target\.long\(\)'),
        (torch.ones(4, 3), torch.zeros(4, dtype=torch.bool), r'integer dtype, got torch\.bool'),
        (torch.ones(4, 3), torch.zeros(4, 2).long(), r'soft targets of a floating-point dtype, got torch\.int64'),
        (torch.ones(4, 3), torch.tensor([0, -1, 2, 1]), r'class indices non-negative, got -1 to 2'),
    ],
    ids=[
        'feature map',
        'vector',
        'integer features',
        'mismatched batch',
        'target of three dimensions',
        'scalar target',
        'float class indices',
        'bool class indices',
        'integer one-hot',
        'negative label',
    ],
)
def test_what_does_not_fit_is_refused_with_the_fix(features, label, message):
    with pytest.raises(ValueError, match=message):
        mine_hard_pairs(features, label)
