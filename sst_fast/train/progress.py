"""What a running training tells: a bar or log lines, TensorBoard, a CSV file. Only rank 0 speaks."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from sst_fast import distributed
from sst_fast.train.checkpoint import replacing

SPECTRUM = "spectrum.csv"  # in a run's folder


def say(text: str) -> None:
    """A line on stderr."""
    if distributed.ranks()[0] == 0:
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()


class Progress:
    """A bar in epochs with ETA on a terminal, a log line now and then elsewhere, and the same values for TensorBoard.

    Args:
        label: what runs; out: the run's folder; epochs: of the whole run; epoch: where it begins (2.5: in the middle of the
            third); step, images: so many have been seen before.
    """

    def __init__(self, label: str, out: Path, *, epochs: int, epoch: float, step: int, images: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.label, self.out, self.step, self.images = label, out, step, images
        self.epochs, self.now = epochs, epoch
        self.first = (epoch, images)
        self.speaks = distributed.ranks()[0] == 0
        self.begin = self.spoke = time.monotonic()
        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1) if self.speaks else None
        self.bar = tqdm(
            initial=epoch, total=epochs, desc=label, leave=False, disable=not (self.speaks and sys.stderr.isatty()),
            bar_format="{desc}: {percentage:3.0f}%|{bar}| epoch {n:.1f}/{total} [{elapsed}<{remaining}{postfix}]",
        )  # fmt: skip

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.writer is not None:
            self.writer.close()
        say(
            f"{self.label}: epoch {self.now:.4g}/{self.epochs}, {self.step} steps, {self.images} images, {self.seconds:.1f} s"
        )

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self.begin

    def advance(self, epoch: float, images: int, values: Mapping[str, Tensor]) -> None:
        """A batch of so many images is done, and so many epochs. ``values`` leave the device only when they are shown."""
        self.step += 1
        self.images += images
        self.bar.update(epoch - self.now)
        self.now = epoch
        now = time.monotonic()
        if self.writer is None or now - self.spoke < (10 if self.bar.disable else 0.5):
            return
        self.spoke = now
        shown = {name: value.item() for name, value in values.items()}
        for name, value in shown.items():
            self.writer.add_scalar(f"batch/{name}", value, self.step)
        rate = (self.images - self.first[1]) / self.seconds
        if not self.bar.disable:
            self.bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()} | {"images/s": f"{rate:.0f}"})
            return
        told = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in shown.items())
        eta = (self.epochs - epoch) * self.seconds / (epoch - self.first[0])
        say(
            f"{self.label}: epoch {epoch:.2f}/{self.epochs}, step {self.step}, {told}, {rate:.0f} images/s, ETA {eta:.0f} s"
        )

    def epoch(self, history: list[dict[str, float]], seconds: list[float], spectrum: NDArray[np.float64]) -> None:
        """An epoch is done, the last row of ``history``; ``seconds`` trained at the end of each, and the singular spectrum of
        the embeddings that are watched."""
        if self.writer is None:
            return
        for name, value in history[-1].items():
            self.writer.add_scalar(name, value, self.step)
        rows = [{**row, "seconds": round(time, 3)} for row, time in zip(history, seconds, strict=True)]
        with replacing(self.out / "metrics.csv") as path, path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), restval="")
            table.writeheader()
            table.writerows(rows)
        self._log_spectrum(len(history), [f"{share:.6g}" for share in spectrum])

    def _log_spectrum(self, epoch: int, spectrum: list[str]) -> None:
        """One more row; those of epochs that a resumed run trains again are left out."""
        file, rows = self.out / SPECTRUM, []
        if file.exists():
            with file.open(encoding="utf-8", newline="") as opened:
                rows = [row for row in csv.reader(opened) if row and row[0].isdigit() and int(row[0]) < epoch]
        rows.append([str(epoch), *spectrum])
        columns = max(map(len, rows))
        with replacing(file) as path, path.open("w", encoding="utf-8", newline="") as opened:
            csv.writer(opened).writerows([["epoch", *range(1, columns)], *rows])
