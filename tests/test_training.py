"""From a folder of images to a report: data, backbones, verification, resuming, command line."""

import csv
import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from runs import config, make_faces

import sst_fast
from bench.claims.__main__ import main as claims_main
from sst_fast import data, evaluation
from sst_fast.data import commands as data_commands
from sst_fast.margins import MARGINS, AMSoftmax, ArcSoftmax, CombinedMargin, MagFace, Margin
from sst_fast.train import backbones, demo, loop, report
from sst_fast.train.cli import COMMANDS, main
from sst_fast.train.config import Config, DataConfig
from sst_fast.train.progress import Progress

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shared_faces(tmp_path_factory):
    return make_faces(tmp_path_factory.mktemp("shared") / "faces", people=4)


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
    assert "rank-1" in capsys.readouterr().out


def test_info_tells_what_would_run(capsys):
    assert main(["info"]) == 0
    assert "margin_softmax on cpu: cpu" in capsys.readouterr().out
    assert main(["info", "--device", "cuda", "--queue_dtype", "bfloat16", "--dim", "512"]) == 0
    assert "margin_softmax on cuda: " in capsys.readouterr().out
    assert main(["info", "--dtype", "int8"]) == 1
    assert "dtype must be one of float64" in capsys.readouterr().err


def test_demo_writes_one_self_contained_page(tmp_path, monkeypatch, capsys):
    assert main(["demo", "--folds", "1", "--epochs", "2", "--out", str(tmp_path), "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert "Semi-Siamese Training" in told
    assert "One fold does not tell" in told
    page = (tmp_path / "report.html").read_text()
    assert report.claim()["sentence"] in page
    assert "1,600 identities" in page
    (link,) = re.findall('<a href="([^"]*claim.md)"', page)
    assert (tmp_path / link).resolve().exists()
    monkeypatch.setattr(report, "__file__", str(tmp_path / "a" / "b" / "report.py"))
    assert report._page_of_claim(tmp_path / "report.html") == ""  # in a wheel
    assert "AT&amp;T Laboratories Cambridge" in page
    assert 'src="http' not in page
    assert page.count("<svg") == 13  # the claim, nine of the training, a ROC, two histograms
    for title in ("Effective rank of the test embeddings", "Singular spectrum of the test embeddings"):
        assert f'aria-label="{title}"' in page
    assert page.count("data:image/png") == 16


def test_every_four_folds_hold_out_everyone_once(capsys):
    held = [set(demo.split(demo.DemoConfig(), fold)[1].names) for fold in range(8)]
    for four in (held[:4], held[4:]):
        assert len(set.union(*four)) == sum(map(len, four)) == 40
    assert held[0] not in held[4:]
    for fold in range(8):
        trained, _ = demo.split(demo.DemoConfig(), fold)
        assert not set(trained.names) & held[fold]
    assert main(["demo", "--folds", "0"]) == 1
    assert "folds must be in [1, 100], got 0" in capsys.readouterr().err


def folds(*accuracies, rank=9.0):
    return [
        report.Result([], SimpleNamespace(accuracy=a, tar={0.001: a}, rank1=0.5, effective_rank=rank + a))
        for a in accuracies
    ]


def test_the_difference_is_taken_fold_by_fold():
    row, *_ = rows = report.table({"sst": folds(0.81, 0.86, 0.91), "conventional": folds(0.80, 0.84, 0.88)})
    assert row.methods["sst"] == pytest.approx((86.0, 5.0))
    assert row.difference == pytest.approx((2.0, 1 / 3**0.5))
    assert [r.difference for r in rows if r.name == "rank-1, %"] == [(0.0, 0.0)]


def test_the_verdict_is_a_t_test_for_all_figures_together():
    def told(ours, theirs):
        return report.verdict(report.table({"sst": ours, "conventional": theirs}), len(ours))

    low, high = folds(0.800, 0.840, 0.880, 0.840), folds(0.901, 0.940, 0.979, 0.940, rank=50.0)
    assert told(high, low).startswith(
        "Semi-Siamese Training is better in accuracy. That is more than chance may make (4 folds"
    )
    assert told(low, high).startswith("Conventional (learned class weights) is better in accuracy. ")
    # Two standard errors are not enough for four folds, nor is the same difference in two of them.
    for ours in (folds(0.82, 0.85, 0.93, 0.85, rank=50.0), folds(0.81, 0.85, rank=50.0)):
        assert told(ours, low[: len(ours)]).startswith(
            "No difference in accuracy, TAR at FAR 0.1 and 0.01, or rank-1 is more "
        )
    assert told(folds(0.81), folds(0.80)).startswith("One fold does not tell")


def test_a_demo_does_not_tell_scores_of_other_settings(tmp_path, capsys):
    command = ["demo", "--folds", "1", "--out", str(tmp_path), "--device", "cpu"]
    settings = demo.settings_for(demo.DemoConfig(folds=1, epochs=3, out=str(tmp_path)), "sst", 0)
    (tmp_path / "sst-0").mkdir()
    (tmp_path / "sst-0" / "config.yaml").write_text(yaml.safe_dump(replace(settings, lr=0.5).as_dict()))
    assert main([*command, "--epochs", "3"]) == 1
    assert "sst-0 was begun with lr=0.5, now it is 0.0117; give another --out" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [tmp_path / "sst-0"]
    (tmp_path / "sst-0" / "config.yaml").write_text(yaml.safe_dump(settings.as_dict()))
    demo.begun_alike(replace(settings, device="cuda"))


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
def test_recipes_are_the_authors(monkeypatch, file, epochs, steps):
    recipe = parsed(monkeypatch, "--config", str(Path(__file__).parent.parent / "examples" / f"{file}.yaml"))
    assert (recipe.margin, recipe.momentum_warmup) == (AMSoftmax(0.35), 0)
    assert recipe.epochs == epochs
    recipe.check(72778)
    for i, step in enumerate(steps):
        assert recipe.lr_factor(step - 1) == pytest.approx(0.1**i)
        assert recipe.lr_factor(step) == pytest.approx(0.1 ** (i + 1))


def failing(capsys, *arguments):
    """The one line that a command says, and its status."""
    capsys.readouterr()
    code = main(list(arguments))
    (line,) = capsys.readouterr().err.splitlines()
    return code, line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 1}, "batch must be at least 2"),
        ({"epochs": 0}, "epochs must be > 0, got 0"),
        ({"epochs": 2.5}, "epochs must be of the type int, got 2.5"),
        ({"epochs": True}, "epochs must be of the type int, got True"),
        ({"lr": "0.1"}, "lr must be of the type float, got '0.1'"),
        ({"lr": float("nan")}, "lr must be > 0 and finite, got nan"),
        ({"scale": 0.0}, "scale must be > 0 and finite, got 0.0"),
        ({"width": -1.0}, "width must be > 0 and finite"),
        ({"momentum": 1.5}, r"momentum must be in \[0, 1\], got 1.5"),
        ({"milestones": (10, 20)}, r"milestones must be shares of all epochs in \(0, 1\]"),
        ({"method": "moco"}, "method must be one of 'sst', 'conventional', got 'moco'"),
        ({"margin": Margin()}, "margin must be one of Softmax, AMSoftmax"),
        ({"margin": "am"}, "margin must be of the type Margin, got 'am'"),
        ({"backbone": "resnet"}, "backbone must be 'mobilefacenet' or 'timm:NAME', got 'resnet'"),
        ({"out": ""}, "out must be a folder, got ''"),
        ({"data": {"size": 100}}, "data.size must be a multiple of 16 for mobilefacenet, got 100"),
        ({"data": {"channels": 2}}, r"data.channels must be 1 \(gray\) or 3 \(RGB\), got 2"),
        ({"data": {"test_share": 1.0}}, r"data.test_share must be in \[0, 1\), got 1.0"),
        ({"shard": True, "method": "conventional"}, "shard needs method='sst'"),
        ({"verify_every": 1}, "verify_every needs data.test_share or data.test_root"),
    ],
)
def test_impossible_settings_are_named_at_once(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes | {"data": DataConfig(**changes.get("data", {}))})


def test_settings_depend_on_the_data(faces, tmp_path):
    bad = config(faces, tmp_path / "run", queue_size=2)
    with pytest.raises(ValueError, match="batch: 3 identities do not fit into a queue of queue_size=2"):
        loop.train(bad, *loop.split(bad))
    with pytest.raises(ValueError, match="batch must be a multiple of the 2 processes, two for each, got 3"):
        bad.check(9, world=2)


def test_numbers_of_other_libraries_are_taken():
    """A checkpoint holds the settings as JSON, long after the start."""
    found = Config(epochs=np.int64(3), lr=torch.tensor(0.5), out=Path("a/b"), margin=AMSoftmax(torch.tensor(0.25)))
    again = json.loads(json.dumps(found.as_dict()))
    assert (again["epochs"], again["lr"], again["out"]) == (3, 0.5, "a/b")
    assert again["margin"] == {"class_path": "AMSoftmax", "init_args": {"margin": 0.25}}


def test_an_epochs_last_shorter_group_of_batches_counts_as_much(faces, tmp_path):
    """Three batches by two: the second step's gradient is its one batch's, as without accumulation."""
    seen = {}
    for accumulate in (1, 2):
        settings = config(faces, tmp_path, method="conventional", accumulate=accumulate, lr=1e-12, weight_decay=0.0)
        torch.manual_seed(0)
        state = loop.start(settings, range(9), torch.device("cpu"))
        gradients = seen.setdefault(accumulate, [])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                state.optimizer, "step",
                lambda into=gradients, s=state: into.append(
                    torch.cat([p.grad.flatten().clone() for p in s.model.parameters()])
                ),
            )  # fmt: skip
            pairs = data.Pairs(data.folder(faces).subset(list(range(9))), 32, 1, seed=0)
            quiet = type("", (), {"advance": lambda *_: None, "agreed": lambda _: ""})()
            loop.train_epoch(state, state.model, pairs, 0, torch.device("cpu"), quiet, quiet)
    one, two = seen[1], seen[2]
    assert (len(one), len(two)) == (3, 2)
    torch.testing.assert_close(two[0], (one[0] + one[1]) / 2)
    torch.testing.assert_close(two[1], one[2])


def test_a_run_too_short_for_its_momentum_says_so(faces, tmp_path, capsys):
    run = config(faces, tmp_path / "a", epochs=1, momentum=0.999, momentum_warmup=0)
    loop.train(run, *loop.split(run))
    told = capsys.readouterr().err
    assert "momentum=0.999 is high for so short a run: after its 3 updates" in told
    assert "to 100 % what it was untrained" in told
    assert Config().momentum_warmup > 0
    for settings in (Config(), Config(epochs=1)):
        assert not loop.too_short(replace(settings, batch=10), 200)  # 20 updates
    assert loop.too_short(Config(momentum_warmup=0, epochs=80, batch=30), 30)  # 0.999^80 = 0.92
    assert not loop.too_short(Config(momentum_warmup=0, epochs=250), 72778)


def test_help_explains_every_option(capsys):
    names = [[name] for name in COMMANDS if name != "data"] + [["data", name] for name in data_commands.COMMANDS]
    for name in names:
        with pytest.raises(SystemExit):
            main([*name, "--help"])
        text = capsys.readouterr().out.split("\noptions:\n")[1]
        # An option, its value if any, and then words that are not the parser's own.
        for option, words in re.findall(r"^  (-\S+|[a-z]+)\b(.*(?:\n {8,}.*)*)", text, re.MULTILINE):
            explained = re.sub(r"\((type|required|default).*", "", " ".join(words.split()), flags=re.DOTALL)
            assert len(re.findall(r"[a-z]{2,}", explained)) >= 2, (name, option, words)


def test_version_needs_no_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sst-fast {sst_fast.__version__}\n"
    assert main(["info"]) == 1
    assert "pip install 'sst-fast[train]'" in capsys.readouterr().err


@pytest.mark.parametrize("command", [main, claims_main], ids=["sst-fast", "bench.claims"])
def test_nothing_is_told_where_nobody_reads(command, monkeypatch, capsys):
    """As in ``sst-fast info | head -1``."""
    end, begin = os.pipe()
    os.close(end)
    with os.fdopen(begin, "w") as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        assert command(["info"] if command is main else ["--list"]) == 141
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "sst-fast: expected"),
        (["paint"], 2, "sst-fast: argument command: invalid choice: 'paint'"),
        (["train"], 1, "sst-fast train: data.root must be given: a folder of identities, a list file or 'orl'"),
        (["train", "--epoch", "3"], 2, "sst-fast train: unrecognized arguments: --epoch 3"),
        (["train", "--epochs", "x"], 2, "sst-fast train: epochs: Expected a int. Got value: x"),
        (["train", "--config", "nofile.yaml"], 2, "sst-fast train: config: File does not exist"),
        (["train", "--scale", "-3"], 2, "sst-fast train: scale must be > 0 and finite, got -3.0"),
        (["train", "--milestones", "[10,20]"], 2, "sst-fast train: milestones must be shares of all epochs"),
        (["train", "--out", ""], 2, "sst-fast train: out must be a folder, got ''"),
        (["train", "--margin", "arcc"], 2, "sst-fast train: margin must be one of Softmax (softmax), AMSoftmax (am)"),
        (["train", "--margin", "MagFace", "--margin.m3", "1"], 2, "Option 'm3' is not accepted"),
        (
            ["train", "--margin", "arc", "--margin.margin", "50"],
            2,
            "ArcSoftmax: margin must be radians in [0, 3.14159]",
        ),
        (["train", "--data.size", "100"], 2, "sst-fast train: data.size must be a multiple of 16"),
        (["train", "--data.root", "nowhere"], 1, "sst-fast train: data.root: nowhere does not exist"),
        (["train", "--data.root", "{faces}", "--data.test_root", "no"], 1, "train: data.test_root: no does not exist"),
        (["train", "--data.root", "{faces}", "--device", "gpu"], 1, "device must be 'auto', 'cpu', 'cuda' or 'cuda:N'"),
        (["train", "--data.root", "{faces}", "--device", "cuda:99"], 1, "device: 'cuda:99' was asked for"),
        (["train", "--data.root", "{faces}", "--init", "no", "--out", "{out}"], 1, "train: init: no does not exist"),
        (["eval", "no", "{faces}"], 1, "sst-fast eval: run: no does not exist"),
    ],
)
def test_what_is_wrong_with_a_command_is_one_line(shared_faces, tmp_path, capsys, arguments, code, message):
    got, line = failing(capsys, *(a.format(faces=shared_faces, out=tmp_path / "out") for a in arguments))
    assert message in line
    assert got == code


def parsed(monkeypatch, *arguments):
    """The configuration that ``sst-fast train`` would run."""
    found = []

    def train(config):
        """Nothing but to look."""
        found.append(config)

    monkeypatch.setitem(COMMANDS, "train", train)
    assert main(["train", *arguments]) == 0
    return found[0]


def test_margins_by_class_or_short_name_with_their_fields(monkeypatch, tmp_path):
    assert parsed(monkeypatch).margin == AMSoftmax(0.35)
    assert parsed(monkeypatch, "--margin", "AMSoftmax", "--margin.margin", "0.4").margin == AMSoftmax(0.4)
    assert parsed(monkeypatch, "--margin=combined", "--margin.m3=0.1").margin == CombinedMargin(m3=0.1)
    assert parsed(monkeypatch, "--margin", "magface", "--margin.lower_norm", "5").margin == MagFace(lower_norm=5)
    for name, kind in MARGINS.items():
        assert parsed(monkeypatch, "--margin", name).margin == kind()
        assert parsed(monkeypatch, "--margin", kind.__name__).margin == kind()
    file = tmp_path / "run.yaml"
    file.write_text("margin: arc\nepochs: 7\n")
    found = parsed(monkeypatch, "--config", str(file), "--margin.margin", "0.3")
    assert (found.margin, found.epochs) == (ArcSoftmax(0.3), 7)
    file = tmp_path / "run.toml"
    file.write_text('epochs = 7\n[margin]\nclass_path = "ArcSoftmax"\n[margin.init_args]\neasy = true\n')
    assert parsed(monkeypatch, "--config", str(file)).margin == ArcSoftmax(easy=True)
    assert parsed(monkeypatch, "--config", str(file), "--margin", "am").margin == AMSoftmax(0.35)
    given = '{"class_path": "sst_fast.ArcSoftmax", "init_args": {"easy": true}}'
    assert parsed(monkeypatch, "--margin", given, "--margin.margin=0.2").margin == ArcSoftmax(0.2, easy=True)


def test_a_run_folder_tells_what_was_done(faces, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    run = config(faces, out, epochs=2, verify_every=1, margin=CombinedMargin(m3=0.1))
    done = loop.train(run, *loop.split(run))
    told = capsys.readouterr().err
    assert f"epoch 2/2, accuracy {done.scores.accuracy:.4f}" in told
    assert f"rank1 {done.scores.rank1:.4f}" in told
    assert "epoch 2/2, 6 steps, 36 images" in told
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "3"), ("2", "6")]
    assert 0 < float(rows[0]["seconds"]) < float(rows[1]["seconds"])
    scores = json.loads((out / "scores.json").read_text())
    assert (scores["epoch"], scores["accuracy"], scores["rank1"]) == (2, done.scores.accuracy, done.scores.rank1)
    assert scores["tar"] == {str(far): tar for far, tar in done.scores.tar.items()}
    assert parsed(monkeypatch, "--config", str(out / "config.yaml")) == run


def test_the_bar_counts_epochs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with Progress("sst", tmp_path, epochs=4, epoch=1.5, step=3, images=30) as progress:
        progress.advance(2.0, 20, {"loss": torch.tensor(3.0)})
        assert (progress.bar.n, progress.bar.total) == (2.0, 4)
        assert "epoch 2.0/4" in str(progress.bar)
    assert "sst: epoch 2/4, 4 steps, 50 images" in capsys.readouterr().err


def test_a_training_imports_no_more_than_it_needs():
    """What evaluation, figures and compiling need takes longer to import than all the rest."""
    code = """
import sys, sst_fast.train.loop
print([name for name in ("sklearn", "scipy", "pandas", "matplotlib", "torch._dynamo") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
