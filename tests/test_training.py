"""From a folder of images to a report: data, backbones, verification, resuming, command line."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import config

from sst_fast import data, evaluation
from sst_fast.margins import ArcSoftmax
from sst_fast.train import backbones, loop
from sst_fast.train.cli import main
from sst_fast.train.config import Config


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bfloat16", "channels_last": True},
        {"precision": "float16", "accumulate": 2},
        {"sampler": "spaced", "keep": "mean", "batchnorm": "copy", "queue_dtype": "bfloat16"},
        {"sampler": "left_out", "galleries": 2, "momentum_warmup": 3, "schedule": "cosine"},
        {"method": "conventional", "precision": "bfloat16", "margin": ArcSoftmax(0.3), "scale": 16.0},
    ],
)
def test_settings_train_and_resume_exactly(faces, tmp_path, changes):
    whole = config(faces, tmp_path / "whole", **changes)
    done = loop.train(whole, *loop.split(whole))
    assert all(np.isfinite(list(row.values())).all() for row in done.history)
    broken = replace(whole, out=str(tmp_path / "broken"))
    with pytest.MonkeyPatch.context() as patch:
        asked = iter(["", "", "stop"])
        patch.setattr(loop.Requests, "agreed", lambda self: next(asked, ""))
        with pytest.raises(loop.Stopped):
            loop.train(broken, *loop.split(broken))
        assert loop.train(broken, *loop.split(broken)).history == done.history


def test_accumulated_batches_are_one_large_batch(faces, tmp_path):
    """With learned class weights and no augmentation of batch statistics, halves of a batch give its gradient."""
    pairs = data.Pairs(data.folder(faces), 32, 1, seed=0)
    batch = [torch.stack(x) for x in zip(*([*pairs[i][:2], torch.tensor(i)] for i in range(4)), strict=True)]
    settings = config(faces, tmp_path, method="conventional")
    gradients = []
    for parts in (1, 2):
        torch.manual_seed(0)
        model = loop.start(settings, range(12), torch.device("cpu")).model.eval()
        for part in zip(*(x.chunk(parts) for x in batch), strict=True):
            (model(*part) / parts).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() <= 1e-4 * gradients[0].norm()


def test_two_identities_are_enough(faces, tmp_path):
    tiny = data.folder(faces).subset([0, 1])
    for scheme in ("shuffle", "spaced", "left_out"):
        run = config(faces, tmp_path / scheme, batch=2, queue_size=50, sampler=scheme, lr=0.001, epochs=3)
        assert len(loop.train(run, tiny, None).history) == 3


def test_list_file(faces, tmp_path):
    file = tmp_path / "faces" / "list.txt"
    file.write_text("p0/0.png 7\np0/1.png 7\n\np3/2.png 9\n")
    found = data.faces(file)
    assert found.names == ["7", "9"]
    assert [[p.name for p in paths] for paths in found.paths] == [["0.png", "1.png"], ["2.png"]]
    file.write_text("p0/0.png\n")
    with pytest.raises(ValueError, match=r"line 1: expected 'relative/path label', got 'p0/0.png'"):
        data.faces(file)


def test_lightning_example_trains_and_resumes(tmp_path):
    pytest.importorskip("lightning")
    from examples import lightning_sst

    module = lightning_sst.main(["--epochs", "2", "--out", str(tmp_path)])
    assert len(module.model.criterion.queue) == 20
    assert module.model.updates == 8
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    again = lightning_sst.main(["--epochs", "3", "--out", str(tmp_path), "--resume", str(checkpoint)])
    assert again.model.updates == 12
    assert again.sampler.epoch == 2


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
    assert "rank1" in capsys.readouterr().out


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
    perfect = evaluation.evaluate(torch.eye(20)[labels], labels)
    assert (perfect.accuracy, perfect.rank1) == (1.0, 1.0)
    assert set(perfect.tar.values()) == {1.0}
    assert perfect.effective_rank == pytest.approx(19, rel=1e-6)  # centred: one dimension less
    generator = torch.Generator().manual_seed(0)
    noise = torch.nn.functional.normalize(torch.randn(100, 32, generator=generator))
    chance = evaluation.evaluate(noise, labels)
    assert chance.accuracy < 0.6
    assert chance.tar[0.1] < 0.2


def test_a_diverged_network_is_named():
    with pytest.raises(ValueError, match="embeddings are not finite: the network has diverged"):
        evaluation.effective_rank(torch.full((4, 3), float("nan")))


@pytest.mark.parametrize(
    ("file", "epochs", "steps"), [("first_release", 100, (48, 72, 90)), ("facex_zoo", 250, (150, 200, 230))]
)
def test_recipes_are_the_authors(file, epochs, steps):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Config)
    path = Path(__file__).parent.parent / "examples" / f"{file}.yaml"
    values = parser.instantiate(parser.parse_args(["--config", str(path)]))
    recipe = Config(**{name: value for name, value in vars(values).items() if name != "config"})
    assert recipe.epochs == epochs
    recipe.check(72778)
    for i, step in enumerate(steps):
        assert recipe.lr_factor(step - 1) == pytest.approx(0.1**i)
        assert recipe.lr_factor(step) == pytest.approx(0.1 ** (i + 1))
