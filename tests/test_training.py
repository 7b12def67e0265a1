"""From a folder of images to a report: data, backbones, verification, resuming, command line."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from sst_fast import backbones, data, training, verification
from sst_fast.cli import main
from sst_fast.training import Config, DataConfig


@pytest.fixture
def faces(tmp_path):
    """Six people with three images each: a fixed noise pattern a person, and a little more an image."""
    rng = np.random.default_rng(0)
    root = tmp_path / "faces"
    for person in range(6):
        (root / f"p{person}").mkdir(parents=True)
        base = rng.integers(40, 200, (8, 8))
        for i in range(3):
            pixels = np.kron(base, np.ones((4, 4))) + rng.normal(0, 10, (32, 32))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / f"p{person}" / f"{i}.png")
    return root


def config(root, out, **changes) -> Config:
    base = Config(
        data=DataConfig(str(root), 32, 1, test_share=1 / 3), dim=16, width=0.125, queue_size=7, momentum=0.9,
        epochs=4, batch=3, lr=0.05, out=str(out), device="cpu",
    )  # fmt: skip
    return replace(base, **changes)


def weights(run):
    return [v for v in run.network.state_dict().values()]


@pytest.mark.parametrize("method", ["sst", "conventional"])
def test_interrupted_training_resumes_exactly(faces, tmp_path, method):
    whole = config(faces, tmp_path / "whole", method=method)
    expected = training.train(whole, *training.split(whole))
    broken = config(faces, tmp_path / "broken", method=method)
    original, calls = training.epoch_of_training, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "epoch_of_training", interrupted)
        with pytest.raises(KeyboardInterrupt):
            training.train(broken, *training.split(broken))
    resumed = training.train(broken, *training.split(broken))
    assert len(resumed.history) == 4
    assert resumed.history == expected.history
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed), weights(expected), strict=True))


@pytest.mark.slow
def test_killed_training_ends_bit_identical(faces, tmp_path):
    """A real process, killed (-9) and terminated (SIGTERM, which saves in the middle of an epoch) at random moments."""

    def start(out):
        settings = {"data.root": faces, "data.size": 32, "data.channels": 1, "dim": 16, "width": 0.125, "queue_size": 7,
                    "momentum": 0.9, "epochs": 60, "batch": 3, "device": "cpu", "out": out}  # fmt: skip
        command = [
            sys.executable,
            "-m",
            "sst_fast.cli",
            "train",
            *(f"--{name}={value}" for name, value in settings.items()),
        ]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})

    def steps_done(out):
        path = out / "checkpoint.pt"
        return len(torch.load(path, weights_only=True)["position"]["history"]) if path.exists() else 0

    whole = start(tmp_path / "whole")
    rng, out, codes = random.Random(0), tmp_path / "broken", []
    for how in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGTERM):
        before, process = steps_done(out), start(out)
        while process.poll() is None and steps_done(out) == before:
            time.sleep(0.05)
        time.sleep(rng.random())
        process.send_signal(how)
        codes.append(process.wait())
        assert codes[-1] in (0, -signal.SIGKILL, 128 + signal.SIGTERM), process.stderr.read()
        if codes[-1] == 128 + signal.SIGTERM:
            assert "the same command goes on" in process.stderr.read()
    assert any(codes)
    assert start(out).wait() == 0
    assert whole.wait() == 0
    states = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "broken")]
    for name, value in states[0]["model"].items():
        assert name == "_extra_state" or torch.equal(value, states[1]["model"][name]), name
    assert states[0]["model"]["_extra_state"] == states[1]["model"]["_extra_state"]
    assert states[0]["position"] == states[1]["position"]
    assert (tmp_path / "whole/metrics.csv").read_text() == (out / "metrics.csv").read_text()


def test_checkpoint_of_another_configuration_is_refused(faces, tmp_path):
    first = config(faces, tmp_path / "run", epochs=1)
    training.train(first, *training.split(first))
    other = replace(first, lr=0.5)
    with pytest.raises(ValueError, match=r"written with lr=0.05, now it is 0.5"):
        training.train(other, *training.split(other))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queue_size": 2}, "batch: 3 identities do not fit into a queue of queue_size=2"),
        ({"batch": 1}, "batch must be at least 2"),
        ({"epochs": 0}, "epochs must be > 0, got 0"),
        ({"backbone": "resnet"}, "backbone must be 'mobilefacenet' or 'timm:NAME', got 'resnet'"),
    ],
)
def test_impossible_configurations_are_named(faces, tmp_path, changes, message):
    bad = config(faces, tmp_path / "run", **changes)
    with pytest.raises(ValueError, match=message):
        training.train(bad, *training.split(bad))


def test_unreadable_image_is_named(faces, tmp_path, capsys):
    broken = faces / "p0" / "0.png"
    broken.write_bytes(b"no picture")
    assert main(["train", "--data.root", str(faces), "--data.size", "32", "--out", str(tmp_path / "r"), "--epochs", "1",
                 "--batch", "3", "--dim", "16", "--queue_size", "7"]) == 1  # fmt: skip
    assert "0.png cannot be read as an image" in capsys.readouterr().err


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        data.folder(tmp_path / "none")
    with pytest.raises(ValueError, match="at least two sub-folders with images, found 0"):
        data.folder(tmp_path)


@pytest.mark.parametrize("suffix", ["yaml", "toml"])
def test_command_line_trains_and_evaluates(faces, tmp_path, capsys, suffix):
    file = tmp_path / f"run.{suffix}"
    settings = {"dim": 16, "width": 0.125, "queue_size": 7, "epochs": 3, "batch": 3, "device": "cpu"}
    separator = ": " if suffix == "yaml" else " = "
    file.write_text("".join(f"{name}{separator}{value!r}\n" for name, value in settings.items()).replace("'", '"'))
    out = tmp_path / "run"
    assert main(["train", "--config", str(file), "--epochs", "2", "--data.root", str(faces), "--data.size", "32",
                 "--data.channels", "1", "--out", str(out)]) == 0  # fmt: skip
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert json.loads(state["config"])["epochs"] == 2
    assert len((out / "metrics.csv").read_text().splitlines()) == 3
    assert list((out / "tensorboard").iterdir())
    capsys.readouterr()
    assert main(["eval", str(out), str(faces)]) == 0
    assert "rank-1" in capsys.readouterr().out


def test_info(capsys):
    assert main(["info"]) == 0
    assert "margin_softmax on" in capsys.readouterr().out


def test_demo_writes_one_self_contained_page(tmp_path, capsys):
    assert main(["demo", "--folds", "1", "--epochs", "2", "--out", str(tmp_path), "--device", "cpu"]) == 0
    assert "Semi-Siamese Training" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert "AT&amp;T Laboratories Cambridge" in page
    assert 'src="http' not in page
    assert page.count("data:image/svg") == 3
    assert page.count("data:image/png") == 16


def test_shallow_split_is_disjoint_and_of_two():
    faces = data.orl()
    assert len(faces.names) == 40
    assert all(len(p) == 10 for p in faces.paths)
    shallow = faces.shallow(2, seed=0)
    assert all(len(p) == 2 for p in shallow.paths)
    assert shallow.paths == faces.shallow(2, seed=0).paths
    assert shallow.paths != faces.shallow(2, seed=1).paths


def test_augmentation_depends_on_seed_epoch_and_identity_only(faces):
    pairs = [data.Pairs(data.folder(faces), 32, 3, seed=0) for _ in range(2)]
    pairs[1][4]
    assert torch.equal(pairs[0][2][0], pairs[1][2][0])
    pairs[1].epoch = 1
    assert not torch.equal(pairs[0][2][0], pairs[1][2][0])


def test_gray_augmentation_fills_every_channel():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    found = False
    for seed in range(100):
        tensor = data.to_tensor(data.augment(image, random.Random(seed)))
        found |= torch.equal(tensor[0], tensor[1]) and torch.equal(tensor[1], tensor[2])
    assert found


@pytest.mark.parametrize(("width", "size"), [(1.0, 112), (0.25, 48), (0.5, 64)])
def test_mobilefacenet_shapes(width, size):
    network = backbones.build("mobilefacenet", 64, size, width).eval()
    assert network(torch.randn(2, 3, size, size)).shape == (2, 64)


def test_timm_backbone():
    pytest.importorskip("timm")
    assert backbones.build("timm:resnet18", 32, 64)(torch.randn(2, 3, 64, 64)).shape == (2, 32)
    with pytest.raises(ValueError, match="timm knows no model 'nonsense'"):
        backbones.build("timm:nonsense", 32, 64)


def test_perfect_and_random_embeddings():
    labels = torch.arange(20).repeat_interleave(5)
    perfect = verification.evaluate(torch.eye(20)[labels], labels)
    assert (perfect.accuracy, perfect.rank1) == (1.0, 1.0)
    assert set(perfect.tar.values()) == {1.0}
    assert perfect.effective_rank == pytest.approx(19, rel=1e-6)  # centred: one dimension less
    generator = torch.Generator().manual_seed(0)
    noise = torch.nn.functional.normalize(torch.randn(100, 32, generator=generator))
    chance = verification.evaluate(noise, labels)
    assert chance.accuracy < 0.6
    assert chance.tar[0.1] < 0.2


def test_a_diverged_network_is_named():
    with pytest.raises(ValueError, match="embeddings are not finite: the network has diverged"):
        verification.effective_rank(torch.full((4, 3), float("nan")))
