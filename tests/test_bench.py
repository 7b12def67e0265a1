"""The benchmarks in their smallest form: every provider here agrees with the reference; nothing is said about time."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch

from bench import problems, providers, report, timing
from bench.problems import Problem
from sst_fast.backends.extension import compiled

CPU = torch.device("cpu")
PROBLEMS = [
    replace(Problem(10, 70, 24, dtype=dtype), margin=margin, task=task, sst=sst)
    for dtype in ("float32", "bfloat16")
    for margin in ("softmax", "am", "arc")
    for task in ("forward", "gradient", "prototypes")
    for sst in (True, False)
    if not (sst and task == "prototypes")
]


@pytest.mark.parametrize("provider", providers.PROVIDERS, ids=lambda p: p.name)
def test_every_provider_agrees_with_the_reference(provider):
    done, reasons = 0, set()
    for problem in PROBLEMS:
        reason = provider.why_not(problem, CPU)
        reasons.add(reason)
        # torch.compile takes seconds for each
        if reason or (provider.name == "torch.compile" and (done or problem.margin != "arc")):
            continue
        inputs = problems.make(problem, CPU)
        problems.compare(problem, provider.make(problem, inputs)(), problems.expected(problem, inputs))
        done += 1
    if not done:
        pytest.skip("; ".join(sorted(reasons - {""})))


def test_a_wrong_result_is_named():
    problem = PROBLEMS[0]
    inputs = problems.make(problem, CPU)
    wanted = problems.expected(problem, inputs)
    with pytest.raises(AssertionError, match=r"loss: relative error 0\.01 above 0\.0001"):
        problems.compare(problem, [wanted[0] * 1.01], wanted)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The suite itself, smallest form; memory, which takes a process for each problem, has a test of its own. So does the
    opening of most formats."""
    path = tmp_path_factory.mktemp("bench") / "run.json"
    command = [sys.executable, "-m", "pytest", "bench", "--size", "smoke", "-q", "--device", "cpu", "--benchmark-json", path,
               "-k", "not compile and (not opening or list)", "-p", "no:cacheprovider", "--no-memory"]  # fmt: skip
    # Each problem measures all its contenders, selected or not; torch.compile, which takes seconds, then does nothing.
    quick = {"TRITON_INTERPRET": "0", "TORCHDYNAMO_DISABLE": "1"}
    # A process that thinks itself a worker of ours would measure nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment | quick)
    assert done.returncode == 0, done.stdout[-3000:]
    return path


@pytest.mark.slow
def test_suite_and_report(run, tmp_path):
    suites = {row.suite for row in report.Run.read(run).rows}
    assert suites == {
        "loss",
        "heads",
        "partial_fc",
        "queue",
        "queues",
        "step",
        "host",
        "scaling",
        "evaluation",
        "data",
        "opening",
    }
    assert report.main([str(run), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "## Training step" in text
    assert "Added by the method" in text
    assert (tmp_path / "roofline.svg").stat().st_size > 1000
    assert report.main([str(run), "--keep", str(tmp_path / "kept.json")]) == 0
    assert report.main([str(tmp_path / "kept.json"), "--summary"]) == 0
    assert len(report.Run.read(tmp_path / "kept.json").rows) == len(report.Run.read(run).rows)
    content = json.loads(run.read_text())
    assert "node" not in content["machine_info"]


@pytest.mark.slow
@pytest.mark.skipif(compiled is None, reason="the extension is not built")
def test_comparison_flags_what_became_slower(run, tmp_path, capsys):
    assert report.main([str(run), "--compare", str(run)]) == 0
    capsys.readouterr()
    content = json.loads(run.read_text())
    for row in content["benchmarks"]:
        row["stats"]["data"] = [1.0] * 5
        if row["extra_info"]["provider"] == "ours (cpu)" and row["extra_info"]["suite"] == "loss":
            row["stats"]["data"] = [2.0] * 5
    slow, steady = tmp_path / "slow.json", tmp_path / "steady.json"
    slow.write_text(json.dumps(content))
    for row in content["benchmarks"]:
        row["stats"]["data"] = [1.0] * 5
    steady.write_text(json.dumps(content))
    assert report.main([str(slow), "--compare", str(steady)]) == 1
    told = capsys.readouterr().out
    assert "| ours (cpu) | 2.00 | REGRESSION |" in told
    assert report.main([str(steady), "--compare", str(slow)]) == 0
    assert "faster" in capsys.readouterr().out


def test_memory_is_measured_in_a_process_of_its_own():
    problem = Problem(256, 4096, 64)
    found = timing.peak_memory("bench.test_loss:ready", [asdict(problem), ["ours (reference)"]], CPU)
    logits = 256 * 4096 * 4 / 2**20
    assert set(found) == {"bare products", "ours (reference)"}
    assert 0 <= found["bare products"] < found["ours (reference)"]
    assert logits < found["ours (reference)"] < 20 * logits


def test_other_files_are_refused(tmp_path):
    (tmp_path / "x.json").write_text('{"benchmarks": [{}]}')
    with pytest.raises(ValueError, match="is not the JSON of these benchmarks"):
        report.Run.read(tmp_path / "x.json")
