"""The demo: Semi-Siamese against conventional training on the ORL faces, open-set, several folds."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from sst_fast import data
from sst_fast.margins import AMSoftmax
from sst_fast.train import backbones, checkpoint, report
from sst_fast.train.config import Config, DataConfig, Method
from sst_fast.train.loop import train


@dataclass
class DemoConfig:
    """The demo's settings.

    Attributes:
        folds: how many folds over identities are trained. The first four share one split of the 40 people, the next four another, and so
            on. More folds tell smaller differences; each takes about two minutes on two cores.
        epochs: epochs of each run.
        out: folder for the runs and the report; an interrupted demo there is continued.
        seed: of all random choices. (The methods' settings were searched on a split of seed 100.)
        device: 'cpu', 'cuda', 'cuda:N' or 'auto' (a GPU if there is one).
    """

    folds: int = 4
    epochs: int = 100
    out: str = "runs/demo"
    seed: int = 0
    device: str = "auto"


# The best of eight configurations for each method, on folds of another split: python -m bench.claims.demo, bench/results/demo-orl.jsonl.
TUNED: dict[Method, dict[str, object]] = {
    "sst": {
        "lr": 0.0117, "weight_decay": 0.00428, "scale": 25.2, "margin": AMSoftmax(0.241), "queue_size": 30, "momentum": 0.9,
    },
    "conventional": {"lr": 0.019, "weight_decay": 0.00477, "scale": 28.4, "margin": AMSoftmax(0.128)},
}  # fmt: skip
NOTES = [
    "Each fold trains on 30 identities with two images each, chosen by seed. It tests all ten images of the other 10 "
    "identities: every pair of images is compared. Backbone, augmentation, number of image passes and learning-rate schedule "
    "are the same for both methods. Both are judged by their last checkpoint. For each method the other settings are the best of "
    "eight configurations, found on folds of another split of the same 40 people (bench/results/demo-orl.jsonl), so the figures are somewhat optimistic.",
    "So small a set shows that the whole chain works on real faces, and that it learns to compare people it has never seen. A fold "
    "has 450 genuine pairs of 10 people, so figures move much from fold to fold. Folds share people, so the standard "
    "errors are somewhat too small. A false accept rate of 1e-2 rests on 45 impostor pairs, one of 1e-3 on 4. The queue has 30 slots, far from the 16,384 of the paper, as many as there are training identities. "
    "Accuracy uses the best threshold on the test pairs themselves, so it is optimistic for both methods alike.",
]  # fmt: skip


def run(config: DemoConfig) -> Path:
    """Trains both methods on every fold (resuming what an earlier, interrupted run left), prints the table and writes the
    report; returns its path."""
    if not 1 <= config.folds <= 100:
        raise ValueError(f"folds must be in [1, 100], got {config.folds}")
    begin = time.monotonic()
    for fold in range(config.folds):
        for method in TUNED:
            begun_alike(settings_for(config, method, fold))
    results: dict[Method, list[report.Result]] = {"sst": [], "conventional": []}
    samples: list[report.Sample] = []
    for fold in range(config.folds):
        train_faces, test_faces = split(config, fold)
        embeddings = {}
        for method in results:
            settings_of_run = settings_for(config, method, fold)
            done = train(settings_of_run, train_faces, test_faces, f"fold {fold + 1}/{config.folds} {method}")
            assert done.scores is not None
            results[method].append(report.Result(done.history, done.scores))
            if fold == 0:
                images, labels = data.all_images(test_faces, settings_of_run.data.size, settings_of_run.data.channels)
                embeddings[method] = backbones.embed(done.network, images.split(256)).cpu()
        if fold == 0:
            samples = choose_samples(images, labels, embeddings, config.seed)
    path = Path(config.out) / "report.html"
    report.write(path, results, samples, settings_shown(config), NOTES)
    print(report.text_table(results))
    print(f"\n{time.monotonic() - begin:.0f} s; report: {path.resolve()}")
    return path


def split(config: DemoConfig, fold: int) -> tuple[data.Faces, data.Faces]:
    """Two images of each of 30 people, and all images of the 10 others."""
    faces = data.orl()
    order = list(range(len(faces.names)))
    random.Random(config.seed + fold // 4).shuffle(order)
    held = order[fold % 4 * 10 :][:10]
    return faces.subset([i for i in order if i not in held]).shallow(2, config.seed + fold), faces.subset(held)


def settings_for(config: DemoConfig, method: Method, fold: int) -> Config:
    """One run: a narrow MobileFaceNet on 48-pixel gray crops."""
    common = Config(
        data=DataConfig(size=48, channels=1), dim=128, width=0.5, epochs=config.epochs, batch=10, warmup=5,
        milestones=(0.6, 0.85), seed=config.seed + fold, device=config.device, checkpoint_every=10,
    )  # fmt: skip
    tuned: dict[str, Any] = TUNED[method]
    return replace(common, method=method, out=str(Path(config.out) / f"{method}-{fold}"), **tuned)


def begun_alike(settings: Config) -> None:
    """ValueError if a run in its folder was begun with other settings: its scores would be told as those of these settings."""
    file = Path(settings.out) / "config.yaml"
    if file.exists():
        begun = yaml.safe_load(file.read_text(encoding="utf-8"))
        for name, (was, is_) in checkpoint.changes(file, begun, settings.as_dict()).items():
            raise ValueError(
                f"the run in {settings.out} was begun with {name}={was!r}, now it is {is_!r}; give another --out or remove it"
            )


def settings_shown(config: DemoConfig) -> dict[str, object]:
    """Those of the first fold: one value where both methods have the same."""
    runs = {method: settings_for(config, method, 0) for method in TUNED}
    both = {method: asdict(run) | {"margin": run.margin} for method, run in runs.items()}
    crops = runs["sst"].data
    shown: dict[str, object] = {"folds": config.folds, "size": crops.size, "channels": crops.channels}
    for name, value in both["sst"].items():
        if name not in ("method", "out", "milestones", "data"):
            tuned = [f"{report.NAMES[method]}: {both[method][name]}" for method in TUNED if name in TUNED[method]]
            shown[name] = "; ".join(tuned) or value
    return shown


def choose_samples(
    images: torch.Tensor, labels: torch.Tensor, embeddings: Mapping[Method, torch.Tensor], seed: int
) -> list[report.Sample]:
    """The two hardest and two random genuine pairs under Semi-Siamese Training, and as many impostor pairs."""
    cosines = {method: e @ e.T for method, e in embeddings.items()}
    rows, columns = torch.triu_indices(len(labels), len(labels), 1)
    same = labels[rows] == labels[columns]
    samples = []
    for genuine in (True, False):
        pairs = torch.stack([rows, columns], 1)[same == genuine]
        hard = cosines["sst"][pairs[:, 0], pairs[:, 1]].argsort(descending=not genuine)[:2].tolist()
        for i in hard + random.Random(seed).sample(range(len(pairs)), 2):
            a, b = pairs[i].tolist()
            samples.append(
                report.Sample((images[a], images[b]), genuine, {m: float(c[a, b]) for m, c in cosines.items()})
            )
    return samples
