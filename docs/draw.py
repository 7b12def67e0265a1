"""Draws the figures of the documentation: ``python docs/draw.py`` writes docs/figures/*.svg.

Drawings of the method and of the kernels are boxes and arrows; each margin's curves are computed from ``sst_fast.margins``.
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
import torch

import sst_fast
from sst_fast.margins import MARGINS, Margin

matplotlib.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent / "figures"
BLUE, ORANGE, GREEN, GRAY, WHITE = "#d6e6f7", "#fbe3c8", "#d8efd8", "#ececec", "#ffffff"


class Drawing:
    """Boxes, arrows and words on a white ground, so that it reads on a dark page too."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img" '
            f'font-family="Helvetica, Arial, sans-serif" font-size="14" fill="#1b1f24">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
            '<path d="M0 0 L8 4 L0 8 z" fill="#444"/></marker></defs>',
            f'<rect width="{width}" height="{height}" rx="8" fill="#fff"/>',
        ]

    def words(
        self, x: float, y: float, text: str, anchor: str = "middle", size: int = 14, weight: str = "normal"
    ) -> None:
        for number, line in enumerate(text.split("\n")):
            self.parts.append(
                f'<text x="{x}" y="{y + 18 * number}" text-anchor="{anchor}" font-size="{size}" '
                f'font-weight="{weight}">{escape(line)}</text>'
            )

    def box(
        self, x: float, y: float, w: float, h: float, text: str = "", fill: str = WHITE, dashed: bool = False
    ) -> None:
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="4" fill="{fill}" stroke="#555"{dash}/>')
        lines = text.count("\n")
        self.words(x + w / 2, y + h / 2 + 5 - 9 * lines, text)

    def arrow(
        self, *points: tuple[float, float], text: str = "", at: tuple[float, float] | None = None, dashed: bool = False
    ) -> None:
        path = " L".join(f"{x} {y}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<path d="M{path}" fill="none" stroke="#444" stroke-width="1.5"{dash} marker-end="url(#head)"/>'
        )
        if text:
            (x1, y1), (x2, y2) = points[0], points[-1]
            x, y = at or ((x1 + x2) / 2, (y1 + y2) / 2 - 8)
            self.words(x, y, text, size=13)

    def save(self, name: str) -> None:
        (HERE / name).write_text("\n".join([*self.parts, "</svg>"]) + "\n", encoding="utf-8")


def step() -> None:
    d = Drawing(860, 330, "One step of Semi-Siamese Training")
    d.box(20, 40, 110, 50, "image a\nof person i", GRAY)
    d.box(20, 200, 110, 50, "image b\nof person i", GRAY)
    d.box(190, 40, 150, 50, "probe network\n(trained)", BLUE)
    d.box(190, 200, 150, 50, "gallery network\n(follows)", ORANGE)
    d.arrow((130, 65), (190, 65))
    d.arrow((130, 225), (190, 225))
    d.arrow((265, 90), (265, 200), text="moving average,\nafter each step", at=(205, 140), dashed=True)
    d.box(410, 40, 110, 50, "probe\n[D]", BLUE)
    d.arrow((340, 65), (410, 65))
    d.words(575, 190, "gallery queue: one feature a slot, K slots, in a ring", "middle", 13)
    for slot in range(11):
        window = slot in (5, 6)
        d.box(400 + 38 * slot, 200, 38, 50, "", GREEN if window else ORANGE)
    d.arrow((340, 225), (398, 225))
    d.words(628, 272, "batch window", size=13, weight="bold")
    d.words(628, 290, "where this batch goes:\nshows each probe its partner", size=12)
    d.box(620, 40, 220, 50, "margin-softmax\n(one kernel, one pass)", WHITE)
    d.arrow((520, 65), (620, 65))
    d.arrow((730, 176), (730, 90))
    d.arrow((680, 40), (680, 18), (265, 18), (265, 40), text="gradient", at=(470, 14))
    d.words(20, 310, "The same again with a and b exchanged, in the same launch.", "start", 12)
    d.save("step.svg")


def window() -> None:
    d = Drawing(760, 250, "The queue and its batch window")
    d.words(20, 30, "The queue is a ring. A batch of B features overwrites the B oldest slots, in place.", "start")
    for slot in range(16):
        fill = GREEN if 6 <= slot < 10 else ORANGE if slot < 6 else GRAY
        d.box(20 + 45 * slot, 60, 45, 40, str(slot), fill)
    d.words(120, 120, "features of earlier batches", size=13)
    d.words(300, 120, "this batch's slots", size=13)
    d.words(605, 120, "oldest features", size=13)
    d.box(200, 150, 180, 34, "for probes of image a: b", GREEN)
    d.box(200, 195, 180, 34, "for probes of image b: a", GREEN)
    d.arrow((380, 167), (392, 167), (392, 102))
    d.arrow((380, 212), (425, 212), (425, 102))
    d.words(
        460,
        160,
        "For the loss, the window shows these slots\nas they will be, once for each direction.\nNothing is copied: the kernel reads\nthe window instead of the old slots.",
        "start",
        13,
    )
    d.save("window.svg")


def sweep() -> None:
    d = Drawing(760, 335, "One pass over the queue finds loss and gradient")
    d.words(20, 28, "eager", "start", weight="bold")
    d.box(20, 45, 60, 90, "X\n[N, D]", BLUE)
    d.box(110, 45, 150, 90, "logits [N, K]\nwritten, read,\nread again ...", GRAY)
    d.box(290, 45, 60, 90, "dX\n[N, D]", BLUE)
    d.arrow((80, 90), (110, 90))
    d.arrow((260, 90), (290, 90))
    d.words(20, 175, "here", "start", weight="bold")
    d.box(20, 190, 60, 90, "X\n[N, D]", BLUE)
    for tile in range(12):
        d.box(110 + 35 * tile, 205, 35, 60, "", GREEN if tile == 5 else ORANGE)
    d.words(320, 198, "queue [K, D], read once, tile by tile", size=13)
    d.arrow((80, 235), (110, 235))
    d.box(570, 190, 170, 90, "running maximum,\nsum of e^z,\nmoments of e^z w", BLUE)
    d.arrow((530, 235), (570, 235))
    d.words(385, 80, "Ordinary code writes N x K numbers to memory\nand reads them again for each step.", "start", 13)
    d.words(
        110,
        298,
        "For each tile: cosines, masks, margin, e^z, and at once the weighted sum of the slots,\nwhich is the gradient. The N x K numbers live in caches or registers only.",
        "start",
        13,
    )
    d.save("sweep.svg")


def shards() -> None:
    d = Drawing(760, 250, "A queue in shards")
    for rank in range(3):
        y = 30 + 70 * rank
        d.box(20, y, 120, 46, f"probes of\nrank {rank}", BLUE)
        d.box(300, y, 150, 46, f"shard {rank}\nK / 3 slots", ORANGE)
        d.box(560, y, 180, 46, f"loss and gradient\nof rank {rank}'s probes", GREEN)
    for a in range(3):
        for b in range(3):
            d.arrow((140, 53 + 70 * a), (300, 53 + 70 * b))
            d.arrow((450, 53 + 70 * a), (560, 53 + 70 * b))
    d.words(
        380, 240, "Every probe visits every shard. Sums of e^z add up, so the result is that of one queue.", size=13
    )
    d.save("shards.svg")


def rooms() -> None:
    d = Drawing(760, 300, "Rooms of the code; arrows mean imports")
    d.box(20, 30, 150, 46, "sst_fast/train", GRAY)
    d.box(210, 30, 150, 46, "sst_fast/evaluation", GRAY)
    d.box(400, 30, 150, 46, "sst_fast/data", GRAY)
    d.box(590, 30, 150, 46, "sst_fast/nn", GRAY)
    d.box(210, 125, 340, 46, "the core: sst_fast/*.py", BLUE)
    d.box(210, 220, 150, 46, "sst_fast/backends", ORANGE)
    d.box(400, 220, 150, 46, "kernels/ (Triton)", GREEN)
    d.box(590, 220, 150, 46, "csrc/ (C++, CUDA)", GREEN)
    d.arrow((170, 45), (210, 45))
    d.arrow((360, 53), (400, 53))
    d.arrow((95, 30), (95, 14), (475, 14), (475, 30))
    d.arrow((95, 76), (95, 148), (210, 148))
    d.arrow((285, 76), (285, 125))
    d.arrow((475, 76), (475, 125))
    d.arrow((665, 76), (665, 148), (550, 148))
    d.arrow((285, 171), (285, 220))
    d.arrow((360, 243), (400, 243))
    d.arrow((285, 266), (285, 286), (665, 286), (665, 266))
    d.save("rooms.svg")


def cpu_kernel() -> None:
    d = Drawing(760, 270, "How the CPU kernel is cut")
    d.box(20, 60, 110, 120, "64 probes,\npacked once\n[D, 64]", BLUE)
    for chunk in range(4):
        d.box(190 + 90 * chunk, 60, 90, 40, f"chunk {chunk}", ORANGE)
    d.arrow((130, 80), (190, 80))
    d.words(370, 48, "queue, never packed: chunks are tasks for threads", size=13)
    for tile in range(4):
        d.box(280 + 22.5 * tile, 100, 22.5, 30, "", GREEN)
    d.words(325, 150, "tiles that stay in the L2 cache", size=13)
    d.box(190, 180, 160, 60, "1  cosines\nC[slot][probe]", WHITE)
    d.box(380, 180, 160, 60, "2  masks, margin,\ne^z, sums", WHITE)
    d.box(570, 180, 170, 60, "3  moments\nO[feature][probe]", WHITE)
    d.arrow((350, 210), (380, 210))
    d.arrow((540, 210), (570, 210))
    d.words(
        20,
        262,
        "Vectors run over probes, so each probe keeps to its own lane; 1 and 3 are the same micro-kernel.",
        "start",
        12,
    )
    d.save("kernel_cpu.svg")


def triton_kernel() -> None:
    d = Drawing(760, 230, "How the Triton kernel is cut")
    d.box(20, 50, 160, 100, "prepare\nunit rows, target\ncosines, weights", BLUE)
    for split in range(4):
        d.box(240 + 66 * split, 50, 60, 46, f"split {split}", ORANGE)
    d.box(504, 50, 66, 46, "window", GREEN)
    d.words(
        400,
        120,
        "sweep: a block of probes times one split of the slots;\nmoments [rows, D] in registers; no atomics",
        size=13,
    )
    d.box(620, 50, 120, 100, "combine\nsplits in order:\nloss, gradient", BLUE)
    d.arrow((180, 73), (240, 73))
    d.arrow((570, 73), (620, 73))
    d.words(380, 205, "Three launches and one allocation a call.", size=13)
    d.save("kernel_triton.svg")


def hopper_kernel() -> None:
    d = Drawing(760, 280, "How the Hopper kernel is cut")
    d.box(20, 40, 190, 60, "loading warpgroup\ncopy engine, tiles of 64", GRAY)
    d.box(290, 40, 170, 60, "shared memory\nring of tiles", ORANGE)
    d.box(540, 30, 200, 80, "warpgroup A\neven tiles to weights,\nhalf of the D columns", BLUE)
    d.box(540, 150, 200, 80, "warpgroup B\nodd tiles to weights,\nthe other half", BLUE)
    d.box(290, 160, 170, 60, "weights of a tile\n[64 probes, 64 slots]", GREEN)
    d.arrow((210, 70), (290, 70))
    d.arrow((460, 60), (540, 60))
    d.arrow((460, 85), (540, 170))
    d.arrow((540, 100), (460, 180))
    d.arrow((540, 200), (460, 200))
    d.words(
        380,
        262,
        "While one turns cosines into weights, the other's products run. Two blocks share every tile.",
        size=13,
    )
    d.save("kernel_hopper.svg")


def margin(name: str, example: Margin) -> None:
    """psi and phi over the angle, and the slope that the gradient gets."""
    theta = torch.linspace(0.02, np.pi - 0.02, 400, dtype=torch.float64)
    a = theta.cos().requires_grad_()
    norm = torch.full_like(theta, 60.0)
    used = example.for_batch(norm) if example.uses_norm else example
    hard = torch.full_like(theta, 0.3) if used.uses_hard_mean else None
    psi = used.psi(a, hard)
    (slope,) = torch.autograd.grad(psi.sum(), a)
    target = torch.full((400, 1), 0.5, dtype=torch.float64)
    phi = used.phi(a.detach()[:, None], target)[:, 0]
    degrees = np.degrees(theta.numpy())
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.6), layout="constrained")
    left.plot(degrees, a.detach(), color="0.6", lw=1, label="cosine")
    left.plot(degrees, psi.detach(), label="ψ, the target's")
    left.plot(degrees, phi, "--", label="φ, others' (target at 60°)")
    left.set(xlabel="angle in degrees", ylabel="what the softmax sees")
    left.legend(fontsize=7)
    right.plot(degrees, slope.numpy() * np.sin(theta.numpy()))
    right.plot(degrees, np.sin(theta.numpy()), color="0.6", lw=1)
    right.set(xlabel="angle in degrees", ylabel="pull on the angle, −dψ/dθ")
    figure.savefig(HERE / f"margin_{name}.svg", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    HERE.mkdir(exist_ok=True)
    plt.rcParams |= {"svg.hashsalt": "sst-fast", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
    for draw in (step, window, sweep, shards, rooms, cpu_kernel, triton_kernel, hopper_kernel):
        draw()
    for name, kind in MARGINS.items():
        margin(name, kind())
    print(f"sst-fast {sst_fast.__version__}: {len(list(HERE.glob('*.svg')))} figures in {HERE}", file=sys.stderr)


if __name__ == "__main__":
    main()
