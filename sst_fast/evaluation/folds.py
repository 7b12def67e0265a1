"""Verification of listed pairs in folds, as on LFW, and the lists themselves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Rule = Literal["accuracy", "facexzoo"]
STEPS = 1000  # of FaceX-Zoo's rule


@dataclass(frozen=True)
class Folds:
    """Verification in folds.

    Attributes:
        accuracy: float64 [folds], each with the threshold from the other folds.
        thresholds: float64 [folds].
    """

    accuracy: NDArray[np.float64]
    thresholds: NDArray[np.float64]

    @property
    def mean(self) -> float:
        """Mean accuracy over folds."""
        return float(self.accuracy.mean())

    @property
    def standard_error(self) -> float:
        """Standard error of the mean: deviation with n - 1 in the denominator, over the square root of the number of folds."""
        return float(self.accuracy.std(ddof=1) / np.sqrt(len(self.accuracy)))


def verify_in_folds(scores: ArrayLike, genuine: ArrayLike, *, folds: int = 10, rule: Rule = "accuracy") -> Folds:
    """Accuracy of each fold with the threshold that the others choose (Huang et al., "Labeled Faces in the Wild", 2007, view 2).

    Folds are runs of neighbouring pairs, as in LFW's list (10 x 600), CFP-FP (10 x 700) and insightface's evaluation. A list
    that holds all genuine pairs before all impostor pairs (CALFW, CPLFW) is cut so that each fold takes its part of both.

    Args:
        scores: [P], higher is more alike; genuine: bool [P]; folds: their number.
        rule: 'accuracy': the threshold with the highest accuracy, in the middle between two neighbouring scores, and the middle
            one of several as good; a score at the threshold is accepted. 'facexzoo' (FaceX-Zoo, test_protocol/lfw): of 1,000 steps from
            the lowest to the highest score the first with the highest TPR - FPR; a score at the threshold counts as wrong either way.

    Raises:
        ValueError: fewer pairs than folds, or a threshold has to be chosen without genuine or without impostor pairs.
    """
    s, g = np.asarray(scores, np.float64), np.asarray(genuine, bool)
    if s.ndim != 1 or s.shape != g.shape:
        raise ValueError(f"scores and genuine must be [P] both, got {list(s.shape)} and {list(g.shape)}")
    if not 2 <= folds <= len(s):
        raise ValueError(f"folds must be in [2, number of pairs = {len(s)}], got {folds}")
    if not np.isfinite(s).all():
        raise ValueError("scores are not finite")
    if rule not in ("accuracy", "facexzoo"):
        raise ValueError(f"rule must be 'accuracy' or 'facexzoo', got {rule!r}")
    choose = _most_accurate if rule == "accuracy" else _facexzoo
    found = []
    number = fold_numbers(g, folds)
    for fold in range(folds):
        train, test = number != fold, number == fold
        if not g[train].any() or g[train].all():
            raise ValueError(
                f"the folds other than {fold + 1} hold no {'impostor' if g[train].all() else 'genuine'} pair"
            )
        threshold = choose(s[train], g[train])
        if rule == "accuracy":
            right = (s[test] >= threshold) == g[test]
        else:
            right = np.where(g[test], s[test] > threshold, s[test] < threshold)
        found.append((right.mean(), threshold))
    accuracy, thresholds = np.array(found, np.float64).T
    return Folds(accuracy, thresholds)


def fold_numbers(genuine: NDArray[np.bool_], folds: int) -> NDArray[np.int64]:
    """Which fold [P] each pair belongs to, see :func:`verify_in_folds`."""
    from sklearn.model_selection import KFold  # here, since it takes a second that most trainings need not spend

    number = np.empty(len(genuine), np.int64)
    turns = np.flatnonzero(np.diff(genuine.astype(np.int8)))
    runs = [np.arange(len(genuine))]
    if len(turns) == 1 and genuine[0] and min(turns[0] + 1, len(genuine) - turns[0] - 1) >= folds:
        runs = [np.flatnonzero(genuine), np.flatnonzero(~genuine)]
    for run in runs:
        for fold, (_, test) in enumerate(KFold(folds).split(run)):
            number[run[test]] = fold
    return number


def _most_accurate(s: NDArray[np.float64], g: NDArray[np.bool_]) -> float:
    values, position = np.unique(s, return_inverse=True)
    genuine = np.bincount(position, g, len(values))
    impostor = np.bincount(position, ~g, len(values))
    # Candidate k rejects the k lowest values.
    right = np.append(0, impostor.cumsum()) + np.append(genuine[::-1].cumsum()[::-1], 0)
    best = np.flatnonzero(right == right.max())
    k = int(best[len(best) // 2])
    if k == 0:
        return float(values[0])
    if k == len(values):
        return float(np.nextafter(values[-1], np.inf))
    return float((values[k - 1] + values[k]) / 2)


def _facexzoo(s: NDArray[np.float64], g: NDArray[np.bool_]) -> float:
    low, high = s.min(), s.max()
    thresholds = low + (high - low) / STEPS * np.arange(1, STEPS + 1)
    rates = []
    for part in (s[g], s[~g]):
        rates.append((len(part) - np.searchsorted(np.sort(part), thresholds, side="right")) / len(part))
    return float(thresholds[np.argmax(rates[0] - rates[1])])


@dataclass(frozen=True)
class PairList:
    """Listed pairs: relative paths of the images (each once), row numbers [P] of both images, genuine bool [P], folds."""

    paths: list[str]
    first: NDArray[np.int64]
    second: NDArray[np.int64]
    genuine: NDArray[np.bool_]
    folds: int = 10


def is_pair_list(path: Path) -> bool:
    """Whether a text file is a list of pairs: its name begins with 'pairs', or its lines have the form of one pair each."""
    if path.name.lower().startswith("pairs"):
        return True
    with path.open(encoding="utf-8", errors="replace") as file:
        lines = [line.split() for line, _ in zip(file, range(20), strict=False) if line.strip()]
    try:
        pairs = [_one_line(path, 0, line) for line in lines[1:] or lines]
    except ValueError:
        return False
    return bool(pairs)


def read_pairs(path: str | Path) -> PairList:
    """A list of pairs in one of these forms, told apart by its lines:

    - LFW's ``pairs.txt``: a first line with the numbers of folds and of pairs, then ``name i j`` (genuine) and
      ``name i other j``; images are ``name/name_0001.jpg``. Without the first line: RFW's lists.
    - FaceX-Zoo's for CALFW and CPLFW: two lines a pair, ``image label`` each; 0 is an impostor pair.
    - ``image image label``, a line a pair; label 1 is genuine, 0 and -1 are not.

    Fields are separated by tabs, or by spaces if the line has no tab.

    Raises:
        FileNotFoundError: no such file. ValueError: a line is of another form; names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if line.strip():
            lines.append((number, line.strip().split("\t" if "\t" in line.strip() else None)))
    folds = 10
    if lines and all(field.isdigit() for field in lines[0][1]) and len(lines[0][1]) <= 2:
        if len(lines[0][1]) == 2:
            folds = int(lines[0][1][0])
        lines = lines[1:]
    if not lines:
        raise ValueError(f"{path} lists no pairs")
    pairs = _two_lines(path, lines) if len(lines[0][1]) == 2 else [_one_line(path, *line) for line in lines]
    names = {name: i for i, name in enumerate(dict.fromkeys(name for a, b, _ in pairs for name in (a, b)))}
    rows = np.array([(names[a], names[b]) for a, b, _ in pairs], np.int64)
    return PairList(list(names), rows[:, 0], rows[:, 1], np.array([same for _, _, same in pairs], bool), folds)


Pair = tuple[str, str, bool]


def _one_line(path: Path, number: int, fields: list[str]) -> Pair:
    def image(person: str, index: str) -> str:
        return f"{person}/{person}_{int(index):04}.jpg"

    if len(fields) == 3 and fields[1].isdigit() and fields[2].isdigit():
        return image(fields[0], fields[1]), image(fields[0], fields[2]), True
    if len(fields) == 4 and fields[1].isdigit() and fields[3].isdigit():
        return image(fields[0], fields[1]), image(fields[2], fields[3]), False
    if len(fields) == 3 and fields[2] in ("0", "1", "-1"):
        return fields[0], fields[1], fields[2] == "1"
    raise ValueError(
        f"{path}, line {number}: expected 'name i j', 'name i other j' or 'image image 0|1', got {' '.join(fields)!r}"
    )


def _two_lines(path: Path, rows: list[tuple[int, list[str]]]) -> list[Pair]:
    for number, fields in rows:
        if len(fields) != 2 or not fields[1].lstrip("-").isdigit():
            raise ValueError(f"{path}, line {number}: expected 'image label', got {' '.join(fields)!r}")
    if len(rows) % 2:
        raise ValueError(f"{path}: expected two lines for each pair, got {len(rows)} lines")
    pairs = []
    for (number, a), (_, b) in zip(rows[::2], rows[1::2], strict=True):
        if (a[1] == "0") != (b[1] == "0"):
            raise ValueError(f"{path}, line {number}: the two lines of a pair have the labels {a[1]} and {b[1]}")
        pairs.append((a[0], b[0], a[1] != "0"))
    return pairs
