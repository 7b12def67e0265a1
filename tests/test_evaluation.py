"""Evaluation of embeddings: everything found block by block is what a plain matrix of all cosines gives."""

import importlib
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_curve

from bench import timing
from sst_fast import evaluation
from sst_fast.evaluation import blocked


def embeddings(images, dim, identities, *, seed=0, noise=1.0):
    """Random unit embeddings and labels, in random order."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(identities, (images,), generator=generator)
    centres = torch.randn(identities, dim, generator=generator)
    noisy = centres[labels] + noise * torch.randn(images, dim, generator=generator)
    return torch.nn.functional.normalize(noisy), labels


def signs(images, identities, *, seed=0):
    """Unit embeddings of 16 numbers +-1/4, whose cosines are exact and often equal."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(identities, (images,), generator=generator)
    return (torch.randint(2, (images, 16), generator=generator) - 0.5) / 2, labels


def matrix(x, labels):
    """All cosines, whose pairs are genuine, which pairs are counted (each once)."""
    labels = labels.numpy()
    return (x @ x.T).numpy(), labels[:, None] == labels[None], np.triu(np.ones((len(x), len(x)), bool), 1)


def brute_force(x, labels, fars):
    """The same numbers by definition, threshold by threshold."""
    scores, same, once = matrix(x, labels)
    genuine, impostor = scores[same & once], scores[~same & once]
    tar = {}
    for far in fars:
        good = [t for t in [*np.unique(scores), np.inf] if (impostor >= t).mean() <= far]
        tar[far] = (genuine >= min(good)).mean()
    accuracy = max((genuine >= t).mean() + (impostor < t).mean() for t in [*np.unique(scores), np.inf]) / 2
    np.fill_diagonal(same, False)
    ranks = [
        int((row[~mates & (np.arange(len(row)) != i)] >= row[mates].max()).sum()) if mates.any() else -1
        for i, (row, mates) in enumerate(zip(scores, same, strict=True))
    ]
    return tar, accuracy, np.array(ranks)


@pytest.mark.parametrize("make", [lambda s: embeddings(130, 8, 30, seed=s), lambda s: signs(130, 30, seed=s)])
@pytest.mark.parametrize("block", [7, 64, None])
def test_blocks_give_what_the_matrix_gives(make, block):
    x, labels = make(block or 0)
    fars = (0.3, 0.1, 0.01, 1e-3, 1e-6)
    found = evaluation.all_pairs(x, labels, fars, block=block)
    scores, same, once = matrix(x, labels)
    tar, accuracy, ranks = brute_force(x, labels, fars)
    assert {far: rate.value for far, rate in found.pairs.tar_at(fars).items()} == pytest.approx(tar, abs=1e-12)
    assert found.pairs.accuracy() == pytest.approx(accuracy, abs=1e-12)
    assert np.array_equal(found.rank, np.minimum(ranks, blocked.MAX_RANK))
    assert found.pairs.genuine.sum() == (same & once).sum()
    assert found.pairs.impostor.sum() == (~same & once).sum()
    np.fill_diagonal(scores, -np.inf)
    np.testing.assert_allclose(found.best_impostor, np.where(same, -np.inf, scores).max(1), rtol=1e-6)
    np.testing.assert_allclose(found.best_genuine, np.where(same, scores, -np.inf).max(1), rtol=1e-6)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=20), st.lists(st.integers(-3, 3), min_size=1, max_size=20))
def test_rates_of_listed_scores_with_ties(genuine, impostor):
    g, i = np.array(genuine) / 4, np.array(impostor) / 4
    pairs = evaluation.PairScores.of(g, i)
    for far in (0.5, 0.1, 0.0):
        rate = pairs.tar_at([far])[far]
        assert rate.value == max((g >= t).mean() for t in [*np.r_[g, i], np.inf] if (i >= t).mean() <= far)
        assert rate.value == (g >= rate.threshold).mean()
        assert 0 <= rate.low <= rate.value <= rate.high <= 1
    assert pairs.accuracy() == pytest.approx(max((g >= t).mean() + (i < t).mean() for t in [*np.r_[g, i], 9]) / 2)
    far, frr, _ = pairs.det()
    assert np.all(np.diff(far) <= 0)
    assert np.all(np.diff(frr) >= 0)
    theirs = roc_curve(np.r_[np.ones(len(g)), np.zeros(len(i))], np.r_[g, i], drop_intermediate=False)
    for ours, their in zip(pairs.roc(), theirs, strict=True):
        np.testing.assert_allclose(ours, their)


def test_equal_error_rate_by_hand():
    assert evaluation.PairScores.of([0.9, 0.8], [0.1, 0.2]).eer() == 0
    assert evaluation.PairScores.of([0.1, 0.2], [0.8, 0.9]).eer() == 1
    assert evaluation.PairScores.of([0.9, 0.8, 0.7, 0.1], [0.0, 0.2, 0.3, 0.75]).eer() == 0.25
    assert evaluation.PairScores.of([0.5], [0.5]).eer() == 0.5  # accepted and rejected together


def test_wilson_interval_of_a_textbook():
    """Newcombe 1998, table I: 81 of 263, and 0 of 20."""
    pairs = evaluation.PairScores.of(np.r_[np.ones(81), np.zeros(182)], [0.5])
    assert pairs.tar_at([0.0])[0.0][:3] == pytest.approx((81 / 263, 0.2553, 0.3662), abs=1e-4)
    none = evaluation.PairScores.of(np.zeros(20), [0.5])
    assert none.tar_at([0.0])[0.0][:3] == pytest.approx((0, 0, 0.1611), abs=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_order_and_numbering_change_nothing(seed):
    x, labels = signs(200, 40, seed=seed)
    first = evaluation.evaluate(x, labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    names = torch.randperm(1000, generator=torch.Generator().manual_seed(seed))[:40] - 500
    second = evaluation.evaluate(x[order], names[labels][order])
    for kind in ("scores", "genuine", "impostor"):
        assert np.array_equal(getattr(first.pairs, kind), getattr(second.pairs, kind))
    assert first.rates == second.rates
    assert (first.accuracy, first.eer) == (second.accuracy, second.eer)
    assert np.array_equal(first.cmc, second.cmc)
    assert first.effective_rank == pytest.approx(second.effective_rank, rel=1e-9)
    ours, theirs = (evaluation.collapse(*pair).figures() for pair in ((x, labels), (x[order], names[labels][order])))
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_the_guess_spares_the_second_pass_and_a_wrong_one_does_no_harm(monkeypatch):
    monkeypatch.setattr(blocked, "SAMPLE", 700)
    x, labels = embeddings(1500, 32, 300, noise=1.0)
    passes = []
    count = blocked._Triangle.count
    monkeypatch.setattr(
        blocked._Triangle, "count", lambda self, *a, **k: (passes.append(len(self.order)), count(self, *a, **k))[1]
    )
    fars = (1e-1, 1e-2, 1e-3)
    right = evaluation.all_pairs(x, labels, fars)
    assert [n for n in passes if n == 1500] == [1500]
    monkeypatch.setattr(blocked, "_guess", lambda *_: np.array([5, 40000]))
    wrong = evaluation.all_pairs(x, labels, fars)
    assert [n for n in passes if n == 1500] == [1500] * 3
    assert right.pairs.tar_at(fars) == wrong.pairs.tar_at(fars)
    assert right.pairs.eer() == wrong.pairs.eer()
    assert right.pairs.accuracy() == wrong.pairs.accuracy()


SPECIAL = [math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 1.5, -7.0, 3e38, -3e38]


def scores_to_count(kind, count):
    generator = torch.Generator().manual_seed(count)
    if kind == "cosines":
        return torch.randn(count, generator=generator) / 8
    if kind == "ties":
        return torch.randint(-3, 4, (count,), generator=generator) / 4
    if kind == "special":
        return torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (count,), generator=generator)]
    return torch.randint(-(2**31), 2**31, (count,), generator=generator).int().view(torch.float32)  # any bits at all


def slots_of(bins):
    slots = torch.full((blocked.HALF,), -1, dtype=torch.int16)
    slots[bins] = torch.arange(len(bins), dtype=torch.int16)
    counts = torch.zeros(blocked.HALF, dtype=torch.int64), torch.zeros(len(bins) * blocked.HALF, dtype=torch.int64)
    return slots, *counts


WAYS = [blocked.count_scores_plainly, *([blocked.count_scores] if blocked.compiled else [])]


@pytest.mark.parametrize("count", [0, 1, 2047, 2049, 40_001, (1 << 21) + 3])
@pytest.mark.parametrize("kind", ["cosines", "ties", "special", "any"])
def test_every_score_is_counted_by_its_bits(kind, count):
    """Against a sort of all bits; in plain PyTorch and in C++, on several threads and on one, into counts that are not zero."""
    scores = scores_to_count(kind, count)
    bits = scores.numpy().view(np.uint32)
    there = np.unique(bits >> 16 ^ 0x8000)
    bins = np.r_[0, np.random.default_rng(0).permutation(there)[:60], 77]
    bins = torch.from_numpy(np.unique(bins.astype(np.int64))[::-1].copy())
    for way in WAYS:
        slots, by_bin, by_value = slots_of(bins)
        for _ in range(2):
            way(scores, slots, by_bin, by_value)
        assert np.array_equal(by_bin, 2 * np.bincount(bits >> 16 ^ 0x8000, minlength=blocked.HALF))
        values, counts = np.unique(np.where(bits >> 16 == 0x8000, 0x80000000, bits), return_counts=True)
        slot = slots.long().numpy()[values >> 16 ^ 0x8000]
        expected = np.zeros(len(by_value), np.int64)
        expected[(slot * blocked.HALF + (values & 0xFFFF).astype(np.int64))[slot >= 0]] = 2 * counts[slot >= 0]
        assert np.array_equal(by_value, expected)


@pytest.mark.parametrize("way", WAYS)
def test_threads_that_count_into_one_tally_lose_nothing(way):
    scores = scores_to_count("ties", 30_000)
    slots, by_bin, by_value = slots_of(torch.unique(blocked.HALF // 2 + (scores.view(torch.int32) >> 16)))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda part: way(part, slots, by_bin, by_value), scores.repeat(20).split(10_000)))
    assert by_bin.sum() == by_value.sum() == 600_000
    values, counts = np.unique(scores, return_counts=True)
    assert sorted(by_value[by_value > 0].tolist()) == sorted((20 * counts).tolist())
    assert len(values) == 7


@pytest.mark.skipif(not blocked.compiled, reason="the extension is not built")
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 5), (3, 8), (64, 131), (0, 4)])
@pytest.mark.parametrize("kind", ["cosines", "ties"])
def test_best_scores_in_one_pass(kind, rows, columns):
    scores = scores_to_count(kind, rows * columns + 1)[1:].view(rows, columns).clone()
    scores[:, 0] = -math.inf  # as for genuine pairs
    wanted = [torch.randint(-2, 3, (n,)) / 4 for n in (rows, columns)]
    wanted[1][-1] = math.inf
    torch.library.opcheck(torch.ops.sst_fast.best_scores, (scores, *wanted))
    ways = [blocked.best_scores(scores, *wanted)] + ([blocked.best_scores_plainly(scores, *wanted)] if rows else [])
    for tops, ahead, column_tops, column_ahead in ways:
        assert tops.tolist() == [max(row.tolist()) for row in scores]
        assert column_tops.tolist() == [max([-math.inf, *column.tolist()]) for column in scores.T]
        assert ahead.tolist() == [int((row >= w).sum()) for row, w in zip(scores, wanted[0], strict=True)]
        assert column_ahead.tolist() == [
            int((column >= w).sum()) for column, w in zip(scores.T, wanted[1], strict=True)
        ]
    for bad in [(scores.double(), *wanted), (scores, wanted[0][:-1], wanted[1][:-1])]:
        with pytest.raises(RuntimeError, match="best_scores: "):
            blocked.best_scores(*bad)


@pytest.mark.skipif(not blocked.compiled, reason="the extension is not built")
def test_the_operator_refuses_what_it_would_write_beside():
    scores, (slots, by_bin, by_value) = torch.zeros(5), slots_of(torch.tensor([blocked.HALF // 2]))
    torch.library.opcheck(torch.ops.sst_fast.count_scores, (scores, slots, by_bin, by_value))
    bad = [
        (scores.double(), slots, by_bin, by_value), (scores.expand(2, 5), slots, by_bin, by_value),
        (scores, slots.int(), by_bin, by_value), (scores, slots[:-1], by_bin, by_value),
        (scores, slots, by_bin[:-1], by_value), (scores, slots, by_bin, by_value.int()),
    ]  # fmt: skip
    for arguments in bad:
        with pytest.raises(RuntimeError, match="count_scores: dtypes, shapes or layouts do not fit"):
            blocked.count_scores(*arguments)
    with pytest.raises(RuntimeError, match="count_scores: by_value has too few slots"):
        blocked.count_scores(scores, slots, by_bin, by_value[:-1])


@pytest.mark.skipif(not blocked.compiled, reason="the extension is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_without_the_extension_the_comparison_is_the_same(monkeypatch, dtype):
    monkeypatch.setattr(blocked, "SAMPLE", 300)
    x, labels = embeddings(801, 16, 200)
    found = []
    for compiled in (blocked.compiled, None):
        monkeypatch.setattr(blocked, "compiled", compiled)
        found.append(evaluation.all_pairs(x.to(dtype), labels))
    for kind in ("scores", "genuine", "impostor"):
        assert np.array_equal(*(getattr(one.pairs, kind) for one in found))
    for kind in ("best_genuine", "best_impostor", "rank"):
        assert np.array_equal(*(getattr(one, kind) for one in found))


def test_collapsed_and_degenerate_embeddings():
    labels = torch.arange(6).repeat_interleave(2)
    same = evaluation.evaluate(torch.ones(12, 4) / 2, labels)
    assert (same.accuracy, same.eer, same.rank1, same.tar[0.1]) == (0.5, 0.5, 0.0, 0.0)  # ties are no success
    assert math.isnan(evaluation.cmc(np.array([-1, -1]))[0])
    zero = evaluation.evaluate(torch.zeros(12, 1), labels)  # scores of minus zero are zero
    assert list(zero.pairs.scores) == [0.0]
    assert zero.rank1 == 0
    one = evaluation.evaluate(torch.eye(4)[torch.tensor([0, 0, 1, 2])], torch.tensor([7, 7, 8, 9]))
    assert (one.accuracy, one.rank1) == (1.0, 1.0)  # images without a partner are not searched for


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2]])
def test_sets_without_both_kinds_of_pairs_are_refused(labels):
    with pytest.raises(ValueError, match="at least two identities and two images of one of them"):
        evaluation.evaluate(torch.eye(3), torch.tensor(labels))


def test_bad_embeddings_are_named():
    with pytest.raises(ValueError, match=r"embeddings must be floating point \[M, D\], got torch.int64"):
        evaluation.all_pairs(torch.ones(3, 2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"labels must be integers \[3\], got torch.float32 \[2\]"):
        evaluation.all_pairs(torch.eye(3), torch.zeros(2))
    with pytest.raises(ValueError, match="embeddings are not finite: the network has diverged"):
        evaluation.all_pairs(torch.full((3, 2), math.nan), torch.tensor([0, 0, 1]))


def test_searching_a_gallery():
    x, labels = embeddings(60, 8, 12)
    y, theirs = embeddings(45, 8, 9, seed=1)  # three identities of the probes are not in it
    found = evaluation.search(x, y, labels, theirs)
    scores = (x @ y.T).numpy()
    same = labels.numpy()[:, None] == theirs.numpy()[None]
    known = same.any(1)
    assert 0 < known.sum() < len(x)
    genuine = np.where(same, scores, -np.inf).max(1)
    ranks = (np.where(same, -np.inf, scores) >= genuine[:, None]).sum(1)
    assert np.array_equal(found.rank, np.where(known, ranks, -1))
    np.testing.assert_allclose(found.best_genuine, genuine, rtol=1e-6)
    np.testing.assert_allclose(found.best_impostor, np.where(same, -np.inf, scores).max(1), rtol=1e-6)


def test_collapse_by_definition():
    x, labels = embeddings(90, 6, 20)
    found = evaluation.collapse(x, labels)
    scores, same, once = matrix(x.double(), labels)
    square = 2 - 2 * scores
    assert found.intra_cosine == pytest.approx(scores[same & once].mean(), rel=1e-6)
    assert found.inter_cosine == pytest.approx(scores[~same & once].mean(), rel=1e-6)
    assert found.alignment == pytest.approx(square[same & once].mean(), rel=1e-5)
    assert found.uniformity == pytest.approx(np.log(np.exp(-2 * square[once]).mean()), rel=1e-5)
    values = np.linalg.svd(x.double().numpy() - x.double().numpy().mean(0), compute_uv=False)
    np.testing.assert_allclose(found.spectrum, values / values.sum(), rtol=1e-9)
    assert found.effective_rank == evaluation.effective_rank(x)


def test_columns_of_metrics_are_finite():
    row = evaluation.collapse(torch.eye(3), torch.arange(3)).row()  # no pair of one identity
    assert list(row) == ["effective_rank", "inter_class_cosine", "uniformity"]
    assert row["uniformity"] == pytest.approx(-4)


def test_collapse_in_chunks(monkeypatch):
    x, labels = embeddings(90, 6, 20)
    whole = evaluation.collapse(x, labels).figures()
    monkeypatch.setattr(importlib.import_module("sst_fast.evaluation.collapse"), "CHUNK", 7)
    assert evaluation.collapse(x, labels).figures() == pytest.approx(whole, rel=1e-9)


def test_memory_does_not_grow_with_the_square():
    """The matrix of these cosines alone would take 550 MiB, what was made of it five times that."""
    x, labels = embeddings(12_000, 8, 3000)
    evaluation.evaluate(x[:3000], labels[:3000])
    assert timing.extra_memory(lambda: evaluation.evaluate(x, labels), torch.device("cpu")) < 400


def test_evaluation_leaves_the_number_of_threads_alone():
    before = torch.get_num_threads()
    x, labels = embeddings(40, 4, 8)
    evaluation.evaluate(x, labels)
    assert torch.get_num_threads() == before
