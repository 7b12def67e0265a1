"""All comparisons between many embeddings, block by block: nothing of the size of the comparison is ever in memory.

A float32 score is counted by the upper half of its bits: 65,536 bins, each at most 1/128 of its score wide. Only in the bins
in which a threshold that matters lies are values told apart, by the lower half: that makes them exact. Which bins these are is
guessed from a sample before the one pass over all blocks; if the guess missed one, a second pass reads those bins alone.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from sst_fast.backends.extension import compiled, operator
from sst_fast.evaluation.distribution import FARS, PairScores

HALF = 1 << 16  # values of half of a float32's bits
MOST_BINS = 512  # told apart in one pass; a bin takes 1 MiB
MOST_MIXED = 64  # of them, for the best balanced accuracy
SAMPLE = 4096  # images from which the bins are guessed
MAX_RANK = 100

count_scores, best_scores = operator("count_scores"), operator("best_scores")
_ADDING = threading.Lock()  # of counts in plain PyTorch


@dataclass(frozen=True)
class Comparisons:
    """What came of comparing images with images.

    Attributes:
        pairs: the scores of all pairs.
        best_genuine, best_impostor: float32 [M], the most similar image of the same and of another identity, -inf where
            there is none.
        rank: int64 [M], how many images of other identities are at least as similar as the best genuine one: 0 is
            identification at rank 1. Ties count against the network. Capped at :data:`MAX_RANK`; -1 for images without
            a genuine partner.
    """

    pairs: PairScores
    best_genuine: NDArray[np.float32]
    best_impostor: NDArray[np.float32]
    rank: NDArray[np.int64]

    def cmc(self) -> NDArray[np.float64]:
        """Cumulative match characteristic; see :func:`cmc`."""
        return cmc(self.rank)


class Found(NamedTuple):
    """What came of searching a gallery for probes; fields as in :class:`Comparisons`, [P]."""

    best_genuine: NDArray[np.float32]
    best_impostor: NDArray[np.float32]
    rank: NDArray[np.int64]


def cmc(rank: NDArray[np.int64]) -> NDArray[np.float64]:
    """Cumulative match characteristic [MAX_RANK]: entry k - 1 is the share of images with a genuine partner whose best one
    is among the k most similar identities' images, that is, has fewer than k impostors before it. NaN if none has one."""
    known = rank[rank >= 0]
    if not len(known):
        return np.full(MAX_RANK, np.nan)
    return np.cumsum(np.bincount(known, minlength=MAX_RANK + 1)[:MAX_RANK]) / len(known)


@torch.no_grad()
def all_pairs(
    embeddings: Tensor,
    labels: Tensor,
    fars: Sequence[float] = FARS,
    *,
    progress: bool = False,
    block: int | None = None,
) -> Comparisons:
    """Compares every two of M images once.

    Exact are: the rates at ``fars``, the equal error rate, the best balanced accuracy (of a network near chance, where very
    many thresholds are about as good, it can be too low by up to half of a bin's share of the pairs), the ranks. Other
    points of the curves are exact too, but stand 1/128 of the score apart. Results do not depend on the order of
    the images or the numbers of the identities, but for the rounding of products.

    Args:
        embeddings: floating point [M, D], unit rows; compared in float32, on their device.
        labels: integers [M], identities.
        fars: false accept rates whose thresholds shall be exact.
        progress: shows a bar.
        block: rows of a block; chosen by device if not given.

    Returns:
        Comparisons; arrays in the order of ``embeddings``.

    Raises:
        ValueError: shapes do not fit, embeddings are not finite, or there is no genuine or no impostor pair.
    """
    _check(embeddings, labels)
    triangle = _Triangle(embeddings, labels, block)
    counts = torch.bincount(triangle.numbers)
    if len(counts) < 2 or int(counts.max()) < 2:
        raise ValueError("evaluation needs at least two identities and two images of one of them")
    bins = _guess(embeddings, labels, fars) if len(labels) > 2 * SAMPLE else _no_bins()
    tally = _Tally(bins, embeddings.device)
    best_genuine = triangle.best_genuine()
    best_impostor, rank = triangle.count(tally, best_genuine, progress)
    genuine, impostor = tally.counts()
    tallies, critical = [tally], _critical(genuine, impostor, fars)
    missed = np.setdiff1d(critical, tally.bins)
    if len(missed):
        tallies.append(_Tally(missed, embeddings.device))
        triangle.count(tallies[1], best_genuine, progress)
    back = torch.argsort(triangle.order)
    found = (t[back].cpu().numpy() for t in (best_genuine, best_impostor, rank))
    return Comparisons(_pair_scores(genuine, impostor, critical, tallies), *found)


@torch.no_grad()
def search(
    probes: Tensor, gallery: Tensor, probe_labels: Tensor, gallery_labels: Tensor, *, progress: bool = False
) -> Found:
    """Compares each of P probes [P, D] with each of G gallery images [G, D], unit rows; labels [P], [G] are identities.

    Raises:
        ValueError: shapes do not fit or embeddings are not finite.
    """
    for part in ((probes, probe_labels), (gallery, gallery_labels)):
        _check(*part)
    if probes.shape[1] != gallery.shape[1]:
        raise ValueError(f"probes and gallery must be of one dimension, got {probes.shape[1]} and {gallery.shape[1]}")
    device = probes.device
    theirs, mine = gallery_labels.to(device), probe_labels.to(device).contiguous()
    sorted_labels, order = torch.sort(theirs)
    first, after = (torch.searchsorted(sorted_labels, mine, right=right) for right in (False, True))
    alone = first == after
    genuine = torch.full((len(probes),), -torch.inf, device=device)
    for k in range(int((after - first).max()) if len(probes) else 0):  # the k-th genuine partner of each
        for r in _parts(len(probes), 1 << 14):
            has = r.start + torch.nonzero(first[r] + k < after[r])[:, 0]
            partner = gallery[order[first[has] + k].to(gallery.device)].to(device).float()
            genuine[has] = torch.maximum(genuine[has], torch.linalg.vecdot(probes[has].float(), partner))
    wanted = torch.where(alone, torch.inf, genuine)
    impostor, rank = torch.full_like(genuine, -torch.inf), torch.zeros(len(probes), dtype=torch.int64, device=device)
    rows = _rows_of_block(device, None)
    total = len(probes) * len(gallery)
    with _bar(total, progress) as bar, _workers(device) as run:
        for c in _parts(len(gallery), 4 * rows):
            columns, columns_labels = gallery[c].to(device).float(), theirs[c]

            def compare(r: slice, b: Tensor = columns, labels: Tensor = columns_labels) -> tuple[slice, _Best]:
                scores = probes[r].float() @ b.T
                scores.masked_fill_(mine[r][:, None] == labels[None], -torch.inf)
                return r, _bests(scores, wanted[r], b.new_zeros(len(b)))[0]

            for r, best in run(compare, _parts(len(probes), rows)):
                best.merge(impostor[r], rank[r])
                bar.update((r.stop - r.start) * len(columns))
    rank[alone] = -1
    return Found(genuine.cpu().numpy(), impostor.cpu().numpy(), rank.cpu().numpy())


def pair_scores(embeddings: Tensor, first: Tensor, second: Tensor) -> NDArray[np.float32]:
    """Cosines [P] of listed pairs: rows ``first`` [P] against rows ``second`` [P] of unit ``embeddings`` [M, D]."""
    parts = [
        torch.linalg.vecdot(embeddings[first[p]].float(), embeddings[second[p]].float()).cpu().numpy()
        for p in _parts(len(first), 1 << 16)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


class _Best(NamedTuple):
    """Of each row or column of a block: the most similar impostor, and how many are at least as similar as wanted."""

    top: Tensor
    ahead: Tensor

    def merge(self, best: Tensor, rank: Tensor) -> None:
        """Into the results so far, views of those of the block's rows or columns."""
        torch.maximum(best, self.top, out=best)
        rank.add_(self.ahead).clamp_(max=MAX_RANK)


def _bests(scores: Tensor, wanted_rows: Tensor, wanted_columns: Tensor) -> tuple[_Best, _Best]:
    """Of a block's rows, and of its columns."""
    find = best_scores if compiled and scores.device.type == "cpu" else best_scores_plainly
    found = find(scores, wanted_rows, wanted_columns)
    return _Best(*found[:2]), _Best(*found[2:])


def best_scores_plainly(
    scores: Tensor, wanted_rows: Tensor, wanted_columns: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In PyTorch's own operations what csrc/cpu/pairs.cpp does in one pass.

    Args:
        scores: float32 [R, C], contiguous.
        wanted_rows: float32 [R]; wanted_columns: float32 [C].

    Returns:
        The highest score of each row, how many of the row are at least as high as wanted, int32, and the same of the columns.
    """
    found = []
    for axis, wanted in ((1, wanted_rows[:, None]), (0, wanted_columns)):
        # Ones in float32 are summed many times faster than booleans are counted, and as exactly: there are fewer than 2^24.
        ones = torch.ge(scores, wanted, out=torch.empty_like(scores))
        found += [scores.amax(axis), ones.sum(axis).int()]
    return found[0], found[1], found[2], found[3]


class _Triangle:
    """Every pair of images once, in blocks. Images are sorted by identity, so that genuine pairs lie near the diagonal."""

    def __init__(self, embeddings: Tensor, labels: Tensor, block: int | None) -> None:
        self.embeddings, self.device = embeddings, embeddings.device
        labels = labels.to(self.device)
        self.order = torch.argsort(labels, stable=True)
        self.numbers = torch.unique_consecutive(labels[self.order], return_inverse=True)[1]
        self.in_order = bool((self.order[1:] > self.order[:-1]).all())
        self.size = _rows_of_block(self.device, block)

    def best_genuine(self) -> Tensor:
        """Cosine of each image's most similar one of its identity [M], in sorted order; -inf where there is none."""
        best = torch.full((len(self.order),), -torch.inf, device=self.device)

        def compare(part: tuple[slice, slice, Tensor]) -> tuple[slice, slice, Tensor, Tensor]:
            r, c, columns = part
            c = slice(c.start, c.start + self._near(r, c))
            scores, same = self._scores(r, c, columns[: c.stop - c.start])
            scores.masked_fill_(~same, -torch.inf)
            return r, c, scores.amax(1), scores.amax(0)

        with _workers(self.device) as run:
            for parts in self._blocks():
                for r, c, of_rows, of_columns in run(compare, (part for part in parts if self._near(*part[:2]))):
                    torch.maximum(best[r], of_rows, out=best[r])
                    torch.maximum(best[c], of_columns, out=best[c])
        return best

    def count(self, tally: _Tally, best_genuine: Tensor, progress: bool) -> tuple[Tensor, Tensor]:
        """Adds the scores of all pairs to the tally; best impostor and rank [M], in sorted order, as in Comparisons."""
        alone = torch.isneginf(best_genuine)
        wanted = torch.where(alone, torch.inf, best_genuine)
        impostor = torch.full_like(wanted, -torch.inf)
        rank = torch.zeros(len(wanted), dtype=torch.int64, device=self.device)

        def compare(part: tuple[slice, slice, Tensor]) -> tuple[slice, slice, tuple[_Best, _Best]]:
            r, c, columns = part
            scores, same = self._scores(r, c, columns)
            if same.numel():
                near = scores[:, : same.shape[1]]
                tally.count(0, near[same])
                near.masked_fill_(same, -torch.inf)
            tally.count(1, scores)
            return r, c, _bests(scores, wanted[r], wanted[c])

        total = len(self.order) * (len(self.order) - 1) // 2
        with _bar(total, progress) as bar, _workers(self.device) as run:
            for parts in self._blocks():
                for r, c, bests in run(compare, parts):
                    for part, best in zip((r, c), bests, strict=True):
                        best.merge(impostor[part], rank[part])
                    bar.update(min((r.stop - r.start) * (c.stop - c.start), total - bar.n))
        rank[alone] = -1
        return impostor, rank

    def _blocks(self) -> Iterator[Iterator[tuple[slice, slice, Tensor]]]:
        """Blocks on and above the diagonal, those of the same columns together: rows, columns, the columns' embeddings."""
        for outer in _parts(len(self.order), 4 * self.size):
            columns = self._rows(outer)
            cut = ((r, slice(max(outer.start, r.start), outer.stop)) for r in _parts(outer.stop, self.size))
            yield ((r, c, columns[c.start - outer.start :]) for r, c in cut)

    def _scores(self, r: slice, c: slice, columns: Tensor) -> tuple[Tensor, Tensor]:
        """A block, with -inf on and below the diagonal, and where its pairs are genuine, in the columns in which any can be."""
        scores = self._rows(r) @ columns.T
        width = self._near(r, c)
        same = self.numbers[r][:, None] == self.numbers[c.start : c.start + width][None]
        if r.start == c.start:
            lower = torch.ones_like(same).tril_()
            scores[:, :width].masked_fill_(lower, -torch.inf)
            same &= ~lower
        return scores, same

    def _near(self, r: slice, c: slice) -> int:
        """How many columns, from the first, can be of an identity of these rows."""
        end = int(torch.searchsorted(self.numbers, self.numbers[r.stop - 1], right=True))
        width: int = max(0, min(end, c.stop) - c.start)
        return width

    def _rows(self, part: slice) -> Tensor:
        return self.embeddings[part if self.in_order else self.order[part]].float()


class _Tally:
    """Counts of genuine (0) and impostor scores (1) by bin, and by value in some bins."""

    def __init__(self, bins: NDArray[np.int64], device: torch.device) -> None:
        self.bins = bins
        slots = np.full(HALF, -1, np.int16)
        slots[_raw(bins)] = np.arange(len(bins))
        slots[0] = slots[HALF // 2]  # minus zero is zero
        # By NumPy: memory in which nothing is counted is never touched.
        counts = np.zeros((2, HALF), np.int64), np.zeros((2, len(bins) * HALF), np.int64)
        self.slots, self.by_bin, self.by_value = (torch.from_numpy(a).to(device) for a in (slots, *counts))

    def count(self, kind: int, scores: Tensor) -> None:
        """Adds float32 ``scores``, contiguous, of which -inf does not count. Several threads may call it."""
        count = count_scores if compiled and scores.device.type == "cpu" else count_scores_plainly
        count(scores, self.slots, self.by_bin[kind], self.by_value[kind])

    def counts(self) -> NDArray[np.int64]:
        """[2, bins] in ascending order of score."""
        raw = self.by_bin.cpu().numpy().copy()
        raw[:, _MINUS_INFINITY] = 0
        raw[:, HALF // 2] += raw[:, 0]
        raw[:, 0] = 0
        sorted_counts: NDArray[np.int64] = raw[:, _raw(np.arange(HALF))]
        return sorted_counts


def count_scores_plainly(scores: Tensor, slots: Tensor, by_bin: Tensor, by_value: Tensor) -> None:
    """In PyTorch's own operations what csrc/cpu/pairs.cpp does in one: adds the scores to the counts.

    Args:
        scores: float32, contiguous.
        slots: int16 [HALF], by bin: where its values are told apart, -1 where they are not. Bins are numbered by the upper half
            of the bits as a signed number, from the lowest.
        by_bin: int64 [HALF].
        by_value: int64 [slots times HALF], by slot and lower half of the bits; all values in the bin of minus zero are zero.
    """
    bits = scores.view(-1).view(torch.int32)
    bin_of = torch.bitwise_right_shift(bits, 16).add_(HALF // 2)
    counts = torch.bincount(bin_of, minlength=HALF)
    chosen = torch.index_select(slots >= 0, 0, bin_of)
    bins = bin_of[chosen]
    low = torch.where(bins == 0, 0, bits[chosen] & (HALF - 1))
    places = torch.index_select(slots, 0, bins).long() * HALF + low
    with _ADDING:
        by_bin += counts
        by_value.scatter_add_(0, places, torch.ones_like(places))


_MINUS_INFINITY = (0xFF80 + HALF // 2) % HALF  # the raw index of its bin


def _raw(bins: NDArray[np.int64]) -> NDArray[np.int64]:
    """Upper half of the bits, plus 32,768 modulo 65,536, of bins numbered by ascending score."""
    return np.where(bins < HALF // 2, HALF // 2 - 1 - bins, bins)


def _value(bins: NDArray[np.int64], low: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
    """Scores of ``bins`` (by ascending score) with ``low`` as lower half of their bits; by default the lowest of the bin."""
    if low is None:
        low = np.where(bins < HALF // 2, HALF - 1, 0)
    bits = ((_raw(bins) + HALF // 2) % HALF).astype(np.uint32) << np.uint32(16) | low.astype(np.uint32)
    scores: NDArray[np.float32] = bits.view(np.float32)
    return scores


def _no_bins() -> NDArray[np.int64]:
    return np.zeros(0, np.int64)


def _pair_scores(
    genuine: NDArray[np.int64], impostor: NDArray[np.int64], critical: NDArray[np.int64], tallies: Sequence[_Tally]
) -> PairScores:
    """One entry for each value in the critical bins, one for each other bin."""
    counts = np.stack([genuine, impostor])
    counts[:, critical] = 0
    rest = np.flatnonzero(counts.any(0))
    scores, found = [_value(rest)], [counts[:, rest]]
    for tally in tallies:
        for slot in np.flatnonzero(np.isin(tally.bins, critical)):
            numbers = tally.by_value[:, slot * HALF : (slot + 1) * HALF].cpu().numpy()
            low = np.flatnonzero(numbers.any(0))
            scores.append(_value(np.full_like(low, tally.bins[slot]), low))
            found.append(numbers[:, low])
    values, both = np.concatenate(scores), np.concatenate(found, 1)
    order = np.argsort(values)
    return PairScores(values[order], both[0][order], both[1][order])


def _critical(genuine: NDArray[np.int64], impostor: NDArray[np.int64], fars: Sequence[float]) -> NDArray[np.int64]:
    """The bins within which the thresholds of ``fars``, of the equal error rate and of the best balanced accuracy lie."""
    i, far, tar = _rates(genuine, impostor)
    bins = {_first_above(i, wanted * i[0]) for wanted in fars}
    bins.add(int(np.flatnonzero(far >= 1 - tar)[-1]))
    above = np.append(tar[1:], 0) - np.append(far[1:], 0)  # TAR - FAR of thresholds just above each bin
    best = max(float(above.max()), 0.0)
    possible = above + (tar - np.append(tar[1:], 0))  # as if the bin's genuine pairs came before its impostors
    mixed = np.flatnonzero((possible > best) & (genuine > 0) & (impostor > 0))
    mixed = mixed[np.argsort(-possible[mixed], kind="stable")][:MOST_MIXED]
    return np.array(sorted(bins | set(mixed.tolist())), np.int64)


def _rates(
    genuine: NDArray[np.int64], impostor: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Impostor pairs in each bin and above, and FAR and TAR of the bin's lower edge."""
    g, i = (np.cumsum(counts[::-1])[::-1] for counts in (genuine, impostor))
    return i, i / max(1, i[0]), g / max(1, g[0])


def _first_above(impostors: NDArray[np.int64], allowed: float) -> int:
    """From the top, the first bin with which more than ``allowed`` impostors are accepted; the lowest if there is none."""
    over = np.flatnonzero(impostors > allowed * (1 + 1e-9))
    return int(over[-1]) if len(over) else 0


def _guess(embeddings: Tensor, labels: Tensor, fars: Sequence[float]) -> NDArray[np.int64]:
    """The bins that :func:`_critical` will probably name, from about SAMPLE images of identities chosen at random."""
    numbers = torch.unique(labels, return_inverse=True)[1].cpu()
    counts = torch.bincount(numbers)
    order = torch.randperm(len(counts), generator=torch.Generator().manual_seed(0))
    few = order[: max(2, int((counts[order].cumsum(0) <= SAMPLE).sum()))]
    rows = torch.nonzero(torch.isin(numbers, few))[:, 0]
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: 2 * SAMPLE]]
    sample = _Triangle(embeddings[rows.to(embeddings.device)], numbers[rows], None)
    tally = _Tally(_no_bins(), embeddings.device)
    sample.count(tally, torch.full((len(rows),), -torch.inf, device=embeddings.device), progress=False)
    genuine, impostor = tally.counts()
    if not genuine.any() or not impostor.any():
        return _no_bins()
    i = _rates(genuine, impostor)[0]
    top = int(np.flatnonzero(impostor)[-1])
    found = set()
    for wanted in fars:
        lowest = _first_above(i, 1.15 * wanted * i[0] + 10)
        expected = wanted * i[0] / 1.15 - 10
        highest = _first_above(i, expected) if expected > 0 else top + 48
        found |= set(range(max(0, lowest - 2), min(HALF, highest + 3)))
    for number in _critical(genuine, impostor, ()):
        found |= set(range(max(0, number - 12), min(HALF, number + 13)))
    return np.array(sorted(found) if len(found) <= MOST_BINS else [], np.int64)


def _rows_of_block(device: torch.device, block: int | None) -> int:
    return block or (512 if device.type == "cpu" else 4096)


T = TypeVar("T")
R = TypeVar("R")


@contextlib.contextmanager
def _workers(device: torch.device) -> Iterator[Callable[[Callable[[T], R], Iterable[T]], Iterable[R]]]:
    """A map whose calls share the processor: each on one thread of its own, because a block is too small to be split well."""
    if device.type != "cpu":
        yield map
        return
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield pool.map
        finally:
            torch.set_num_threads(threads)


def _bar(total: int, progress: bool) -> tqdm[Any]:
    return tqdm(total=total, disable=not progress, desc="comparing", unit="pair", unit_scale=True)


def _parts(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(total, start + size))


def _check(embeddings: Tensor, labels: Tensor) -> None:
    if embeddings.dim() != 2 or not embeddings.is_floating_point():
        raise ValueError(f"embeddings must be floating point [M, D], got {embeddings.dtype} {list(embeddings.shape)}")
    if labels.shape != embeddings.shape[:1] or labels.is_floating_point():
        raise ValueError(f"labels must be integers [{len(embeddings)}], got {labels.dtype} {list(labels.shape)}")
    for part in _parts(len(embeddings), 1 << 16):
        if not bool(torch.isfinite(embeddings[part]).all()):
            raise ValueError("embeddings are not finite: the network has diverged; lower lr or enlarge batch")
