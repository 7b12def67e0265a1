"""Tables and figures of docs/claim.md, from files of results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from scipy.stats import t as student

from bench.claims import grid

SCORES = {
    "accuracy": "accuracy", "tar_at_far_0.01": "TAR@1e-2", "tar_at_far_0.001": "TAR@1e-3", "rank1": "rank-1",
}  # fmt: skip


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the 95 % confidence interval of it (Student's t); NaN for fewer than two values."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, float(half)


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation, percent."""
    if not values:
        return ""
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{deviation}"


def difference(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Of runs paired by seed: mean and its 95 % confidence interval, percentage points."""
    if len(ours) != len(theirs) or len(ours) < 2:
        return ""
    mean, half = interval([a - b for a, b in zip(ours, theirs, strict=True)])
    return f"{100 * mean:+.1f} [{100 * (mean - half):+.1f}, {100 * (mean + half):+.1f}]"


def values(results: Sequence[grid.Result], name: str, **wanted: object) -> list[float]:
    """A score of the runs with these settings, by seed."""
    chosen = [r for r in results if all(r[key] == value for key, value in wanted.items())]
    return [max(0.0, grid.score(r, name)) for r in sorted(chosen, key=lambda r: r["seed"])]


def summary(results: Sequence[grid.Result], stage: str, **wanted: object) -> list[str]:
    """Markdown: for each loss conventional training, SST and their difference."""
    lines = ["| loss | | " + " | ".join(SCORES.values()) + " |", "|---|---|" + "---|" * len(SCORES)]
    chosen = [r for r in results if r["stage"] == stage and all(r[key] == value for key, value in wanted.items())]
    for loss in dict.fromkeys(r["loss"] for r in chosen):
        cells: dict[str, list[list[float]]] = {}
        for method in ("conventional", "sst"):
            cells[method] = [values(chosen, score, method=method, loss=loss) for score in SCORES]
            if cells[method][0]:
                lines.append(f"| {loss} | {method} | " + " | ".join(map(spread, cells[method])) + " |")
        gains = [difference(a, b) for a, b in zip(cells["sst"], cells["conventional"], strict=True)]
        if any(gains):
            lines.append(f"| | difference | {' | '.join(gains)} |")
    return lines
