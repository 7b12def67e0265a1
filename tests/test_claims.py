"""``python -m bench.claims``: tuning, tests, resuming, parts and the page, on a data set of a few glyphs."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from bench.claims import demo as demo_tuning
from bench.claims import grid, report, train
from bench.claims.__main__ import main
from sst_fast.data import glyphs
from sst_fast.margins import AMSoftmax
from sst_fast.train import demo
from sst_fast.train.report import claim

SMALL = {
    "training": {"dim": 8, "channels": [2, 2, 2, 2], "batch": 16, "steps": 4, "warmup": 1, "points": 2},
    "data": {"size": 16, "identities": 32}, "tuning": {"configurations": 2}, "seeds": {"test": 2, "length": 1, "depth": 1, "ablation": 1},
    "first": {"queue": 32}, "stages": {"losses": ["am-softmax"], "others": ["masst"], "lengths": [2], "depths": [3]},
}  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Glyphs of matplotlib's fonts and a configuration for them: 17 runs of 4 steps or 8."""
    folder = tmp_path_factory.mktemp("claims")
    fonts = folder / "fonts"
    fonts.mkdir()
    source = next(path for path in glyphs.font_folders() if path.parts[-2:] == ("fonts", "ttf"))
    for name in (
        "DejaVuSans",
        "DejaVuSerif",
        "DejaVuSansMono-Bold",
        "STIXGeneral",
        "STIXGeneralBol",
        "DejaVuSans-Oblique",
    ):
        (fonts / f"{name}.ttf").symlink_to(source / f"{name}.ttf")
    glyphs.glyphs(str(folder / "data"), "latin-greek-cyrillic", str(fonts), 16, test_share=0.8, similar=0.98)
    config = grid.read_config()
    for name, changes in SMALL.items():
        config[name] |= changes
    config["ablations"] = {"keep": ["coin", "mean"]}  # the first is what the test had: not trained again
    (folder / "claims.yaml").write_text(yaml.safe_dump(config))
    return folder


def run(small, out, *more):
    return main(["--data", str(small / "data"), "--config", str(small / "claims.yaml"), "--out", str(out), *more])


@pytest.fixture(scope="module")
def finished(small):
    out, before = small / "all.jsonl", torch.get_num_threads()
    torch.set_num_threads(1)  # as the tests that repeat it: a network's bits depend on the number of threads
    assert run(small, out) == 0
    torch.set_num_threads(before)
    return out


@pytest.mark.usefixtures("one_thread")
def test_the_grid_tunes_tests_and_goes_on_where_it_was(small, finished, tmp_path, capsys):
    results = grid.read_results(finished)
    counts = {
        stage: sum(r["stage"] == stage for r in results.values())
        for stage in ("tune", "test", "length", "depth", "ablation")
    }
    assert counts == {"tune": 6, "test": 6, "length": 2, "depth": 2, "ablation": 1}
    config = grid.of_set(grid.read_config(small / "claims.yaml"), "kanji")
    best = grid.best(config, "kanji", "sst", "am-softmax", results)
    tuned = [r for r in results.values() if (r["stage"], r["method"]) == ("tune", "sst")]
    assert results[best.key]["scores"]["tar_at_far_0.001"] == max(r["scores"]["tar_at_far_0.001"] for r in tuned)
    for result in results.values():
        if (result["stage"], result["method"]) == ("test", "sst"):
            assert (result["lr"], result["queue"]) == (best.lr, best.queue)
            assert [point["step"] for point in result["curve"]] == [2, 4]
            assert len(result["test"]["spectrum"]) == 8
        if result["stage"] == "length":
            assert [point["step"] for point in result["curve"]] == [4, 8]
    # Killed while it wrote the ninth line: eight stay, the rest comes again with the same numbers.
    lines = finished.read_text().splitlines(keepends=True)
    out = tmp_path / "cut.jsonl"
    out.write_text("".join(lines[:8]) + lines[8][:50])
    capsys.readouterr()
    assert run(small, out) == 0
    assert capsys.readouterr().out.count("\n") == len(lines) - 8
    again = grid.read_results(out)
    assert list(again) == list(results)
    assert all(again[key]["scores"] == results[key]["scores"] for key in results)
    assert run(small, out) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("one_thread")
def test_parts_share_the_work(small, finished, tmp_path, capsys):
    out = tmp_path / "shared.jsonl"
    assert run(small, out, "--part", "1/2") == 0
    assert "wait for other parts: test of conventional am-softmax and sst am-softmax" in capsys.readouterr().out
    for part in ("2/2", "1/2"):
        assert run(small, out, "--part", part) == 0
    parts = [grid.read_results(tmp_path / f"shared.{n}of2.jsonl") for n in (1, 2)]
    assert not parts[0].keys() & parts[1].keys()
    whole = grid.read_results(finished)
    assert parts[0].keys() | parts[1].keys() == whole.keys()
    assert all((parts[0] | parts[1])[key]["scores"] == whole[key]["scores"] for key in whole)


@pytest.mark.usefixtures("one_thread")
def test_quick_needs_no_tuning(small, tmp_path, capsys):
    assert run(small, tmp_path / "quick.jsonl", "--quick") == 0
    told = capsys.readouterr().out
    assert told.count("kanji/quick/") == 4
    assert "| am-softmax | sst |" in told
    assert "| | difference |" in told


def test_the_page_holds_what_the_results_say(small, finished, tmp_path, capsys):
    page, readme = tmp_path / "docs" / "claim.md", tmp_path / "README.md"
    page.parent.mkdir()
    (tmp_path / "sst_fast" / "train").mkdir(parents=True)
    readme.write_text("first\n<!-- claim: kanji -->\nold\n<!-- end -->\nlast\n")
    page.write_text("before\n<!-- kanji -->\nold\n<!-- end -->\nafter\n")
    arguments = ["--config", str(small / "claims.yaml"), "--out", str(finished), "--report", str(page)]
    assert main(arguments) == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- kanji -->\n")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "old" not in text
    assert "not complete" not in text
    for words in (
        "| am-softmax | sst |",
        "| | difference |",
        "| masst, am-softmax |",
        "| 3 |",
        "| keep coin |",
        "| keep mean |",
        "lr 0.",
    ):
        assert words in text
    for name in ("losses", "curves", "spectrum"):
        assert (page.parent / "claim" / f"kanji_{name}.svg").exists()
        assert f"claim/kanji_{name}.svg" in text
    told = readme.read_text()
    for method in ("sst", "conventional"):
        score = re.search(rf"^\| am-softmax \| {method} \|.*\| (\S+ ± \S+) \| [^|]+ \|$", text, re.MULTILINE)[1]
        assert f"**{score} %**" in told
    assert re.fullmatch(r"first\n<!-- claim: kanji -->\n.*\(AM-softmax, 2 seeds; .*\)\.\n<!-- end -->\nlast\n", told)
    short = json.loads((tmp_path / "sst_fast" / "train" / "claim.json").read_text())
    assert short["sentence"] in told.replace("**", "")
    for method, (mean, deviation) in short["losses"]["am-softmax"].items():
        assert re.search(rf"^\| am-softmax \| {method} \|.*\| {mean} ± {deviation} \| [^|]+ \|$", text, re.MULTILINE)
    assert main(arguments) == 0
    assert page.read_text() == text
    assert readme.read_text() == told
    (tmp_path / "empty.md").write_text("nothing")
    assert main([*arguments[:-1], str(tmp_path / "empty.md")]) == 1
    assert "has no place for the results of 'kanji'" in capsys.readouterr().err


def test_the_demo_takes_the_settings_that_were_found():
    """The best of its own file of results, by the configuration's score."""
    config = grid.read_config()["demo"]
    rows = demo_tuning.read(Path(__file__).parents[1] / "bench" / "results" / "demo-orl.jsonl")
    runs = demo_tuning.wanted(config, demo.DemoConfig.epochs)
    assert len(rows) == len(runs)
    assert all(run in map(demo_tuning.asked_for, rows) for run in runs)
    for method, settings in demo.TUNED.items():
        of_method = [row for row in rows if row["method"] == method]
        best = demo_tuning.summary(of_method, config["score"])[0]
        number = re.match(rf"{method} (\d+): ", best)[1]
        found = next(row["settings"] for row in of_method if row["configuration"] == int(number))
        assert settings == found | {"margin": AMSoftmax(found["margin"])}


def test_the_demos_search_trains_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_tuning, "FOLDER", tmp_path / "runs")
    out = tmp_path / "found.jsonl"
    begun = {"method": "sst", "configuration": 0, "fold": 1, "epochs": 7, "scores": {}, "split": 100, "settings": {}}
    out.write_text(json.dumps(begun) + "\n")  # of another search: it counts for nothing
    for _ in range(2):
        assert demo_tuning.main(["--out", str(out), "--part", "3/32", "--epochs", "1"]) == 0
        assert re.search(r"^sst 0: \d+\.\d, folds 1, ", capsys.readouterr().out, re.MULTILINE)
    _, row = demo_tuning.read(out)
    assert (row["fold"], row["settings"]["queue_size"]) == (1, 20)
    assert 0.5 <= row["scores"]["accuracy"] <= 1
    assert demo_tuning.main(["--out", str(out), "--part", "0/1"]) == 1
    assert capsys.readouterr().err.startswith("bench.claims.demo: --part must be I/N")


def test_the_demo_shows_what_readme_says():
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8").replace("**", "")
    told = claim()
    assert told["sentence"] in readme
    assert set(told["losses"]["am-softmax"]) == {"sst", "conventional"}


def test_statistics_are_those_of_the_textbook():
    mean, half = report.interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert half == pytest.approx(4.302653 / 3**0.5, rel=1e-5)
    assert report.difference([0.5, 0.6, 0.7], [0.4, 0.5, 0.6]) == "+10.0 [+10.0, +10.0]"
    assert report.difference([0.5], [0.4]) == ""


def test_every_method_draws_the_same_configurations():
    config = grid.read_config()
    for n in range(config["tuning"]["configurations"]):
        runs = [grid.tuning(config, "kanji", *pair)[n] for pair in grid.methods(config)]
        assert len({(run.lr, run.weight_decay, run.scale) for run in runs}) == 1
        assert len({(run.queue, run.momentum) for run in runs if run.method == "sst"}) == 1
        low, high = config["space"]["lr"]
        assert all(low <= run.lr <= high for run in runs)
    assert grid.drawn(config, "am-softmax", 1) != grid.drawn(config, "am-softmax", 2)


def test_augmentation_moves_and_mirrors_only_where_it_may():
    ramp = torch.arange(32, dtype=torch.uint8).expand(64, 1, 32, 32).contiguous()
    generator = torch.Generator().manual_seed(0)
    plain = train.augmented(ramp, False, generator) * 128 + 127.5
    assert (plain[:, 0, 16, 24] > plain[:, 0, 16, 8]).all()
    assert not torch.allclose(plain[0], plain[1])
    mirrored = train.augmented(ramp, True, generator) * 128 + 127.5
    share = (mirrored[:, 0, 16, 24] < mirrored[:, 0, 16, 8]).float().mean()
    assert 0.3 < share < 0.7


@pytest.mark.parametrize("loss", ["triplet", "contrastive", "n-pairs"])
def test_other_losses_learn(loss):
    pytest.importorskip("pytorch_metric_learning")
    torch.manual_seed(0)
    model = train.MetricLearning(torch.nn.Linear(16, 8), loss, 0.5, 20.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    centres = torch.randn(10, 16)
    losses = []
    for _ in range(30):
        a, b = (centres + 0.3 * torch.randn(10, 16) for _ in range(2))
        found = model(a, b, torch.arange(10))
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        losses.append(found.item())
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part", "5/4"], "--part must be I/N with 1 <= I <= N, got '5/4'"),
        (["--data", "nowhere"], "nowhere/train does not exist"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(small, tmp_path, arguments, message, capsys):
    assert run(small, tmp_path / "a.jsonl", *arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_results_of_another_configuration_are_not_mixed(small, tmp_path, capsys):
    out = tmp_path / "a.jsonl"
    out.write_text(json.dumps({"key": "a", "protocol": "other"}) + "\n")
    assert run(small, out) == 1
    assert "line 1 belongs to configuration other" in capsys.readouterr().err
