"""What a running training tells: a bar or log lines, TensorBoard, a CSV file. Only rank 0 speaks."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from sst_fast import distributed
from sst_fast.train.checkpoint import replacing


def say(text: str) -> None:
    """A line on stderr."""
    if distributed.ranks()[0] == 0:
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()


class Progress:
    """A bar with ETA on a terminal, a log line now and then elsewhere, and the same values for TensorBoard.

    Args:
        label: what runs; out: the run's folder; step: where it begins; images: so many have been seen before.
    """

    def __init__(self, label: str, out: Path, step: int, images: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.label, self.out, self.step, self.images, self.first = label, out, step, images, images
        self.total = 0
        self.speaks = distributed.ranks()[0] == 0
        self.begin = self.spoke = time.monotonic()
        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1) if self.speaks else None
        self.bar = tqdm(
            initial=images, desc=label, unit="img", leave=False, disable=not (self.speaks and sys.stderr.isatty())
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.writer is not None:
            self.writer.close()
        say(f"{self.label}: {self.images} images, {self.step} steps, {time.monotonic() - self.begin:.1f} s")

    def expect(self, images: int) -> None:
        """So many are still to come."""
        self.total = self.bar.total = self.images + images

    def advance(self, images: int, values: Mapping[str, Tensor]) -> None:
        """A batch of so many images is done. ``values`` leave the device only when they are shown."""
        self.step += 1
        self.images += images
        self.bar.update(images)
        now = time.monotonic()
        if self.writer is None or now - self.spoke < (10 if self.bar.disable else 0.5):
            return
        self.spoke = now
        rate = (self.images - self.first) / (now - self.begin)
        shown = {name: value.item() for name, value in values.items()}
        for name, value in shown.items():
            self.writer.add_scalar(f"batch/{name}", value, self.step)
        if not self.bar.disable:
            self.bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()})
            return
        told = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in shown.items())
        eta = (self.total - self.images) / rate
        say(f"{self.label}: image {self.images}/{self.total}, {told}, {rate:.0f} images/s, ETA {eta:.0f} s")

    def epoch(self, history: list[dict[str, float]]) -> None:
        """An epoch is done, the last row of ``history``."""
        if self.writer is None:
            return
        for name, value in history[-1].items():
            self.writer.add_scalar(name, value, self.step)
        with replacing(self.out / "metrics.csv") as path, path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(dict.fromkeys(name for row in history for name in row)), restval="")
            table.writeheader()
            table.writerows(history)
