"""sst-fast check and tune, and what serves where a card refuses kernels: by mock backends and on the CPU."""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import sst_fast
from bench import providers, rows
from sst_fast import check, functional, ops, tune
from sst_fast.backends import choose as decisions
from sst_fast.backends import tuned
from sst_fast.backends.backend import Backend, Problem
from sst_fast.backends.extension import compiled
from sst_fast.functional import margin_softmax
from sst_fast.train.cli import main

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def decide_anew(monkeypatch, tmp_path):
    """No choice stored, no backend forced, nothing remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SST_FAST_BACKEND", raising=False)
    decisions.forget()
    functional._backward_runs.clear()
    yield
    decisions.forget()


class Mock(Backend):
    """A backend for the CPU, in front of all others, whose kernels do as they are told."""

    launches = True

    def __init__(self, volunteer=True, operations=("margin_softmax",)):
        self.volunteer, self.operations = volunteer, operations

    def why_not(self, problem):
        return None if problem.operation in self.operations else "not written"

    def volunteers(self, problem):
        return self.volunteer


def plain(*received):
    """The compiled loss under another name."""
    return torch.ops.sst_fast.margin_softmax(*received, "cpu")


@pytest.fixture
def mock(monkeypatch):
    """``mock(loss, prototypes)`` puts a backend named 'mock' first whose operators these functions are."""

    def put(loss=plain, prototypes=None, **options):
        backend = Mock(**options)
        monkeypatch.setattr(decisions, "BACKENDS", {"mock": backend} | decisions.BACKENDS)
        for module in (functional, check):
            monkeypatch.setattr(module, "BACKENDS", decisions.BACKENDS)

        def run(*received):
            *most, name = received
            return loss(*most) if name == "mock" else torch.ops.sst_fast.margin_softmax(*received)

        monkeypatch.setattr(functional, "_operator", run)
        if prototypes is not None:
            monkeypatch.setattr(functional, "_gradient_operator", prototypes)
        return backend

    return put


def refuse(error, *received):
    raise error


def some(trains=False):
    x, w = torch.randn(4, 8, requires_grad=True), torch.nn.functional.normalize(torch.randn(9, 8))
    return x, w.requires_grad_(trains), torch.arange(4)


class OutOfResources(Exception):  # Triton's own inherits from Exception too
    def __init__(self):
        super().__init__(
            "out of resource: shared memory, Required: 131072, Hardware limit: 101376.\nReducing block sizes may help."
        )


needs_extension = pytest.mark.skipif(compiled is None, reason="the extension is not built")


# --- falling back ------------------------------------------------------------------------------------------------------


@needs_extension
@pytest.mark.parametrize(
    "error",
    [OutOfResources(), RuntimeError("Triton Error [CUDA]: invalid device function"), OSError("no cache folder")],
    ids=repr,
)
def test_a_refused_kernel_hands_on_with_one_warning(mock, error):
    mock(partial(refuse, error))
    x, w, y = some()
    with pytest.warns(RuntimeWarning, match="margin_softmax by 'mock' does not run on ") as told:
        found = margin_softmax(x, w, y)
    assert len(told) == 1
    text = str(told[0].message)
    assert decisions.tuned.processor() in text  # the card
    assert " ".join(str(error).split()) in text
    assert "'cpu' serves instead" in text
    assert torch.equal(found, margin_softmax(x, w, y, backend="cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        margin_softmax(x, w, y)
        margin_softmax(torch.cat([x, x, x]), w, y.repeat(3))  # another size is the same problem
        with torch.no_grad():
            margin_softmax(x, w, y)
        margin_softmax(x[:, :5], w[:, :5], y)  # another problem, refused for the same reason
    found.backward()


@needs_extension
@pytest.mark.parametrize(
    "error",
    [
        ValueError("a"),
        TypeError("b"),
        IndexError("target[0] is 9"),
        NotImplementedError("c"),
        torch.OutOfMemoryError("d"),
    ],
    ids=repr,
)
def test_what_the_kernels_are_not_to_blame_for_is_raised(mock, error):
    mock(partial(refuse, error))
    for _ in range(2):  # and nothing was remembered
        with pytest.raises(type(error)):
            margin_softmax(*some())


@needs_extension
@pytest.mark.parametrize("by", ["argument", "environment"])
def test_a_forced_backend_raises(mock, monkeypatch, by):
    mock(partial(refuse, RuntimeError("no kernel image")))
    options = {"backend": "mock"} if by == "argument" else {}
    if by == "environment":
        monkeypatch.setenv("SST_FAST_BACKEND", "margin_softmax=mock")
        decisions.forget()
    with pytest.raises(RuntimeError, match="no kernel image"):
        margin_softmax(*some(), **options)


@needs_extension
def test_it_can_be_forced_after_it_was_left_out(mock):
    mock(partial(refuse, RuntimeError("no kernel image")))
    with pytest.warns(RuntimeWarning):
        margin_softmax(*some())
    assert "failed here: RuntimeError: no kernel image" in str(sst_fast.backends("cpu", dim=8)["margin_softmax"])
    with pytest.raises(RuntimeError, match="no kernel image"):
        margin_softmax(*some(), backend="mock")


@needs_extension
def test_the_error_is_raised_where_nobody_else_can(mock):
    mock(partial(refuse, RuntimeError("no kernel image")))
    x, w, y = some()
    with pytest.raises(RuntimeError, match="no kernel image"):
        margin_softmax(x, w.to(torch.float8_e4m3fn), y, product_dtype=torch.float8_e4m3fn)


@needs_extension
def test_the_compiled_cpu_backend_never_hands_on(monkeypatch):
    monkeypatch.setattr(functional, "_operator", partial(refuse, RuntimeError("a broken build")))
    with pytest.raises(RuntimeError, match="a broken build"):
        margin_softmax(*some())


@needs_extension
def test_a_refused_backward_kernel_is_found_in_forward(mock):
    tried = []

    def gradient(grad_loss, found, *rest):
        tried.append([grad_loss.shape, *(t.dtype for t in found)])
        raise OutOfResources

    mock(prototypes=gradient)
    x, w, y = some(trains=True)
    with pytest.warns(RuntimeWarning, match="'cpu' serves instead"):
        loss = margin_softmax(x, w, y)
    loss.backward()
    mine = w.grad.clone()
    w.grad = None
    margin_softmax(x, w, y, backend="cpu").backward()
    assert torch.equal(mine, w.grad)
    # row_weight, lse, negatives, target_slope, kept, as csrc/operators.cpp hands them on
    assert tried == [[torch.Size([]), torch.float32, torch.float32, torch.int64, torch.float32, torch.uint8]]


@needs_extension
def test_a_backward_kernel_that_runs_is_tried_once(mock):
    tried = []
    mock(prototypes=lambda *received: tried.append(1))
    for _ in range(3):
        margin_softmax(*some(trains=True))
    margin_softmax(*some())
    assert tried == [1]


@needs_extension
def test_the_queue_hands_on_too(mock, monkeypatch):
    mock(operations=("enqueue", "window"))
    queue, right = sst_fast.GalleryQueue(9, 8), sst_fast.GalleryQueue(9, 8, backend="reference")
    batch, ids = torch.randn(4, 8), torch.arange(4)
    monkeypatch.setattr(decisions.BACKENDS["cpu"], "why_not", lambda problem: "not built")
    for name in ("enqueue", "window"):
        monkeypatch.setattr(ops, f"_{name}", partial(refuse, RuntimeError(f"{name}: no kernel image is available")))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        queue.enqueue(batch, ids)
        queue.window(batch, ids)
        queue.enqueue(batch, ids)
    assert [str(w.message).partition(" by 'mock' does not run")[0] for w in told] == [
        "sst_fast: enqueue",
        "sst_fast: window",
    ]
    assert all("'reference' serves instead" in str(w.message) for w in told)
    for _ in range(2):
        right.enqueue(batch, ids)
    assert torch.equal(queue.features, right.features)
    assert torch.equal(queue.state, right.state)


# --- sst-fast check ----------------------------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch):
    """Few cases and no timing."""
    monkeypatch.setattr(check, "CASES", check.CASES[1:3] + check.CASES[7:8] + check.CASES[9:11])
    monkeypatch.setattr(check, "TIMED", {"cpu": ()})


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_backends_here_are_right(backend):
    if backend == "cpu" and compiled is None:
        pytest.skip("the extension is not built")
    rows = list(check.examine(backend, CPU))
    assert {row.verdict for row in rows} <= {"right", "slow", "not here"}, [
        r for r in rows if r.verdict in ("wrong", "failed")
    ]
    assert len({row.problem for row in rows}) == len(rows) > 15
    timed = [row for row in rows if row.problem.startswith("time of")]
    assert timed
    assert all(row.milliseconds > 0 and row.bare > 0 for row in timed)
    assert all(row.difference <= row.bound for row in rows if row.difference is not None)


@pytest.fixture
def bent(mock):
    """``bent(number, change)``: a backend whose result of that number is changed."""

    def put(number, change):
        def loss(*received):
            results = list(plain(*received))
            results[number] = change(results[number])
            return tuple(results)

        mock(loss, volunteer=False)

    return put


@needs_extension
@pytest.mark.parametrize(
    ("number", "output", "change"),
    [
        (0, "loss", lambda t: t + 0.01), (0, "loss", lambda t: t * torch.nan), (1, "lse", lambda t: t + 0.01),
        (2, "target cosine", lambda t: t + 1e-4), (3, "hardest cosine", lambda t: t * 0.999),
        (4, "hardest slot", lambda t: (t + 1) % 300), (5, "beats target", lambda t: t + 9),
    ],
    ids=["loss", "nan", "lse", "target", "hardest", "slot", "beats"],
)  # fmt: skip
def test_a_wrong_number_is_seen(bent, number, output, change):
    bent(number, change)
    example = check.make(33, 300, 64, start=290, identities=500).to(torch.float32)
    row = check.compare(example, "mock", CPU)
    assert (row.verdict, row.output) == ("wrong", output)
    assert check.wrong([row])
    assert check.compare(example, "cpu", CPU).verdict == "right"


@needs_extension
def test_a_row_is_no_class(bent):
    """With sub-centres a hardest slot is the number of a class. Who cannot have them is not checked with them."""
    example = check.make_sub_centers(20, 30, 3, 128)
    bent(4, lambda t: t + 30)
    row = check.compare(example.to(torch.float32), "mock", CPU)
    assert (row.verdict, row.output) == ("wrong", "hardest slot")
    assert check.compare(example.to(torch.float32), "cpu", CPU, trains=True).verdict == "right"
    problem = check.problem_of(example.to(torch.float32, torch.bfloat16))
    assert "no sub-centres" in decisions.BACKENDS["hopper"].why_not_shape(problem)


@needs_extension
def test_a_wrong_gradient_is_seen(monkeypatch):
    real = check.outputs

    def outputs(example, backend, trains=False):
        found = real(example, backend, trains)
        return found if backend == "reference" else found | {"gradient": found["gradient"] * 1.001}

    monkeypatch.setattr(check, "outputs", outputs)
    row = check.compare(check.make(20, 90, 32).to(torch.float32), "cpu", CPU)
    assert (row.verdict, row.output) == ("wrong", "gradient")


@needs_extension
def test_a_backend_that_raises_fails_and_the_rest_goes_on(mock, short):
    mock(partial(refuse, OutOfResources()), volunteer=False)
    check_why_not, rows = check.why_not, []
    try:
        check.why_not = lambda name, problem: decisions.BACKENDS[name].why_not(problem)  # as on a GPU
        rows = list(check.examine("mock", CPU))
    finally:
        check.why_not = check_why_not
    assert [row.verdict for row in rows] == ["failed"] * len(check.CASES)
    assert rows[0].note.startswith("OutOfResources: out of resource: shared memory")


def test_after_the_budget_nothing_is_begun(short):
    rows = list(check.examine("reference", CPU, budget=-1.0))
    assert {row.verdict for row in rows} == {"not reached"}
    assert not check.wrong(rows)


CRASHES = """
import json, os, sys, time
print("something else")
print(json.dumps({"backend": "reference", "problem": "first", "verdict": "right"}), flush=True)
print("CUDA error: an illegal memory access was encountered", file=sys.stderr, flush=True)
%s
"""


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("os.abort()", "was ended by signal 6"),
        ("sys.exit(3)", "ended with status 3"),
        ("time.sleep(60)", "was stopped after"),
    ],
)
def test_a_crash_is_a_row_and_keeps_what_was_found(end, said):
    rows = list(check.isolated("reference", [sys.executable, "-c", CRASHES % end], 60.0 if "sleep" not in end else 2.0))
    assert [row.verdict for row in rows] == ["right", "failed"]
    assert said in rows[1].note
    assert rows[1].problem == "after 'first'"
    assert "illegal memory access" in rows[1].note
    assert check.wrong(rows)


def test_rows_come_as_they_are_found(tmp_path):
    """The process waits for a file that is made once its first row has come."""
    go = tmp_path / "go"
    wait = f"while not os.path.exists({str(go)!r}): time.sleep(0.01)"
    found = check.isolated("reference", [sys.executable, "-c", CRASHES % wait], 60.0)
    assert next(found).problem == "first"
    go.touch()
    assert list(found) == []


def test_the_file_holds_what_was_found_so_far(monkeypatch, tmp_path):
    file, held = tmp_path / "check.json", []

    def isolated(backend, command):
        yield check.Row(backend, "first", "right")
        held.append([row["problem"] for row in json.loads(file.read_text())["rows"]])
        yield check.Row(backend, "second", "failed")

    monkeypatch.setattr(check, "isolated", isolated)
    assert check.main(["--device", "cpu", "--json", str(file)]) == 1
    assert held[0] == ["first"]
    assert {row["verdict"] for row in json.loads(file.read_text())["rows"]} == {"right", "failed"}


@pytest.fixture
def in_process(monkeypatch, capsys):
    """What runs in processes of their own runs in this one, through the same lines of JSON."""

    def isolated(backend, command, patience=0.0):
        assert command[:2] == [sys.executable, "-m"]
        before = capsys.readouterr().out
        {"sst_fast.check": check, "sst_fast.tune": tune}[command[2]].main(command[3:])
        lines = capsys.readouterr().out
        print(before, end="")
        for line in lines.splitlines():
            yield check.Row(**json.loads(line))

    monkeypatch.setattr(check, "isolated", isolated)


def test_command_line(short, in_process, monkeypatch, tmp_path, capsys):
    file = tmp_path / "check.json"
    assert main(["check", "--device", "cpu", "--json", str(file)]) == 0
    told = capsys.readouterr().out
    assert "reference: 8 right" in told
    assert "hopper: not here: " in told
    content = json.loads(file.read_text())
    assert {row["verdict"] for row in content["rows"]} == {"right"}
    assert content["about"]["torch"] == torch.__version__
    real = check.compare
    monkeypatch.setattr(check, "compare", lambda *a: replace(real(*a), verdict="wrong"))
    assert main(["check", "--device", "cpu"]) == 1
    assert "wrong: window, float32, arc: " in capsys.readouterr().out
    assert main(["check", "--device", "tpu"]) == 1
    assert capsys.readouterr().err.startswith(
        "sst-fast check: device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got 'tpu'"
    )


def test_one_backend_by_its_own_process_prints_lines(short, capsys):
    assert check.main(["reference", "--device", "cpu"]) == 0
    rows = [check.Row(**json.loads(line)) for line in capsys.readouterr().out.splitlines()]
    assert [row.verdict for row in rows] == ["right"] * 8


# --- sst-fast tune -----------------------------------------------------------------------------------------------------

ASKED = ["tune", "--n", "20", "--k", "300", "--d", "64", "--dtype", "float32", "--device", "cpu"]
LIKE_IT = Problem("margin_softmax", CPU, dim=64, probes=32, slots=512)


def loss_like_it(n=20, k=300, d=64, **options):
    example = check.make(n, k, d, masks=False).to(torch.float32)
    return margin_softmax(example.embedding.requires_grad_(), example.prototypes, example.target, **options)


@needs_extension
def test_the_fastest_right_backend_is_stored_and_chosen(in_process, monkeypatch, capsys):
    seconds = {"cpu": 2e-3, "reference": 1e-3}
    monkeypatch.setattr(
        check, "measure", lambda timed, names, *rest: {names[0]: seconds[names[0]], "bare products": 1e-4}
    )
    assert main(ASKED) == 0
    told = capsys.readouterr().out
    assert f"reference is stored in {tuned.file()}" in told
    assert "reference (the fastest that sst-fast tune has measured here)" in told
    for window in (False, True):
        assert decisions.choose(LIKE_IT._replace(window=window)) == "reference"
    assert (
        decisions.choose(LIKE_IT._replace(probes=0, slots=0)) == "reference"
    )  # sizes are not known, all entries agree
    for other in ({"slots": 1024}, {"probes": 64}, {"dim": 63}, {"queue_dtype": torch.float16}, {"smooths": True}):
        assert decisions.choose(LIKE_IT._replace(**other)) == "cpu", other
    assert decisions.choose(LIKE_IT, "cpu") == "cpu"
    monkeypatch.setenv("SST_FAST_TUNE", "0")
    assert decisions.choose(LIKE_IT) == "reference"  # it was read when the first decision was made
    decisions.forget()
    assert decisions.choose(LIKE_IT) == "cpu"
    monkeypatch.delenv("SST_FAST_TUNE")
    seconds["reference"] = 3e-3
    assert main(ASKED) == 0
    assert decisions.choose(LIKE_IT) == "cpu"
    assert len(json.loads(tuned.file().read_text())["choices"]) == 2  # the earlier ones were replaced


@needs_extension
def test_what_is_stored_is_what_runs(monkeypatch):
    tuned.store(LIKE_IT, "reference", {})
    ran = []
    real = functional._run
    monkeypatch.setattr(functional, "_run", lambda a, name, trains: ran.append(name) or real(a, name, trains))
    loss_like_it()
    loss_like_it(40)
    assert ran == ["reference", "cpu"]


@needs_extension
def test_it_is_measured_on_the_cpu(in_process, capsys):
    assert main([*ASKED, "--prototypes", "true"]) == 0
    told = capsys.readouterr().out
    assert "cpu" in told
    assert "triton  " not in told.partition("now chosen")[0]
    entry = json.loads(tuned.file().read_text())["choices"]
    assert len(entry) == 1
    assert set(entry[0]["seconds"]) == {"cpu", "reference"}
    assert all(0 < value < 10 for value in entry[0]["seconds"].values())


@needs_extension
def test_what_is_wrong_is_never_chosen_however_fast(bent, in_process, monkeypatch, capsys):
    bent(3, lambda t: t - 0.1)
    monkeypatch.setattr(decisions.BACKENDS["mock"], "launches", False)  # as on a GPU
    monkeypatch.setattr(check, "measure", lambda timed, names, *rest: {names[0]: 1e-3, "bare products": 1e-4})
    monkeypatch.setattr(tune, "BACKENDS", decisions.BACKENDS)
    assert "mock" in tune.candidates(tune.timed_from(20, 300, 64, "float32", False), CPU)
    assert main(ASKED) == 0
    assert decisions.choose(LIKE_IT) == "cpu"
    assert "mock" not in json.loads(tuned.file().read_text())["choices"][0]["seconds"]


@needs_extension
def test_a_tile_is_a_candidate_of_its_own(mock, in_process, monkeypatch, capsys):
    """Whichever tile is the fastest is stored with its backend; a wrong name is refused."""
    backend = mock(volunteer=False)
    monkeypatch.setattr(backend, "launches", False, raising=False)
    monkeypatch.setattr(backend, "tiles", lambda problem: [(32, 64, 4, 1), (64, 64, 8, 2)], raising=False)
    monkeypatch.setattr(tune, "BACKENDS", decisions.BACKENDS)
    seconds = {None: 3e-3, (32, 64, 4, 1): 2e-3, (64, 64, 8, 2): 1e-3}

    def measure(timed, names, *rest):
        mine = seconds[tuned._tried.get("mock")] if names == ["mock"] else 4e-3
        return {names[0]: mine, "bare products": 1e-4}

    monkeypatch.setattr(check, "measure", measure)
    for fastest in ((64, 64, 8, 2), (32, 64, 4, 1), None):
        seconds[fastest] = min(seconds.values()) / 2
        assert main(ASKED) == 0
        name = "mock" if fastest is None else "mock:" + "x".join(map(str, fastest))
        assert f"{name} is stored in" in capsys.readouterr().out
        assert decisions.choose(LIKE_IT) == "mock"
        call = ("mock", CPU, torch.float32, 64, False, False)
        assert tuned.tile(*call, 20, 300) == tuned.tile(*call, 32, 512) == fastest
        for other in ((20, 600), (40, 300)):
            assert tuned.tile(*call, *other) is None
        assert tuned.tile("triton", *call[1:], 20, 300) is None
        stored = json.loads(tuned.file().read_text())["choices"]
        assert all(set(entry["seconds"]) >= {"mock", "mock:32x64x4x1", "mock:64x64x8x2"} for entry in stored)
    monkeypatch.setenv("SST_FAST_TUNE", "0")
    decisions.forget()
    assert tuned.tile(*call, 20, 300) is None
    for name in ("nobody", "mock:64", "mock:axbxcxd"):
        with pytest.raises(ValueError, match="candidate must be a backend, perhaps with a tile as in"):
            tune.parts(name)


@needs_extension
def test_a_backend_on_request_is_chosen_once_it_was_stored(mock):
    mock(volunteer=False)
    assert decisions.choose(LIKE_IT) == "cpu"
    tuned.store(LIKE_IT, "mock", {"mock": 1e-3})
    decisions.forget()
    assert decisions.choose(LIKE_IT) == "mock"
    assert torch.equal(loss_like_it(), loss_like_it(backend="cpu"))


@needs_extension
def test_a_stored_backend_that_is_refused_hands_on(mock):
    mock(partial(refuse, OutOfResources()), volunteer=False)
    tuned.store(LIKE_IT, "mock", {"mock": 1e-3})
    with pytest.warns(RuntimeWarning, match="by 'mock' does not run on"):
        loss_like_it()
    assert decisions.choose(LIKE_IT) == "cpu"


@needs_extension
@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "3",
        '{"format": 0, "choices": []}',
        '{"format": 1, "choices": [{}]}',
        '{"format": 1, "choices": [7]}',
        "\x00",
    ],
)
def test_a_damaged_file_is_ignored_with_one_warning(text):
    tuned.file().parent.mkdir(parents=True)
    tuned.file().write_text(text)
    with pytest.warns(RuntimeWarning, match="the stored choices cannot be used and are ignored") as told:
        loss_like_it()
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_like_it()
        loss_like_it(90, 40)
        tuned.store(LIKE_IT, "reference", {})
        decisions.forget()
        assert decisions.choose(LIKE_IT) == "reference"


@needs_extension
@pytest.mark.parametrize("changed", ["device", "capability", "torch", "triton", "sst_fast", "backend"])
def test_a_choice_holds_for_its_device_and_versions_alone(changed):
    tuned.store(LIKE_IT, "reference", {})
    content = json.loads(tuned.file().read_text())
    entry = content["choices"][0]
    (entry if changed == "backend" else entry["made_for"])[changed] = "another"
    tuned.file().write_text(json.dumps(content))
    decisions.forget()
    assert decisions.choose(LIKE_IT) == "cpu"


@needs_extension
def test_no_file_is_looked_at_once_a_decision_was_made(monkeypatch):
    loss_like_it()
    monkeypatch.setattr(tuned, "file", partial(refuse, AssertionError("a file is looked at")))
    loss_like_it()
    loss_like_it(90, 40)


@needs_extension
def test_a_compiled_graph_takes_the_stored_choice():
    tuned.store(LIKE_IT, "reference", {})
    decisions.forget()
    kernels = []

    def seen(graph, inputs):
        kernels.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    example = check.make(20, 300, 64, masks=False).to(torch.float32)
    torch.compiler.reset()
    torch.compile(margin_softmax, backend=seen, fullgraph=True)(example.embedding, example.prototypes, example.target)
    assert kernels
    assert not any("sst_fast" in name for name in kernels)


def test_where_choices_are_stored(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert tuned.file() == tmp_path / ".cache" / "sst-fast" / "tuned.json"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert tuned.file() == tmp_path / "Library" / "Caches" / "sst-fast" / "tuned.json"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert tuned.file() == tmp_path / "x" / "sst-fast" / "tuned.json"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--n", "0"], "n must be an integer >= 1, got 0"),
        (["--dtype", "int8"], "dtype must be one of"),
        (["--dtype", "float8_e4m3fn", "--prototypes", "true"], "prototypes in float8_e4m3fn are frozen"),
    ],
)
def test_bad_options_are_named(changed, message, capsys):
    assert main([*ASKED, *changed]) == 1
    assert capsys.readouterr().err.startswith(f"sst-fast tune: {message}")


# --- bench/device_check.sh ---------------------------------------------------------------------------------------------

ROOT = Path(__file__).parent.parent


def script(path, text):
    """An executable file of bash."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(text if text.startswith("#!") else f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


@pytest.mark.slow
@needs_extension
def test_every_stage_of_the_device_check_runs_on_the_cpu(tmp_path):
    """Twice: what is finished is not run again. A mock stands in for compute-sanitizer; the two tools get the same command, run once."""
    command = ["bash", str(ROOT / "bench" / "device_check.sh"), "--device", "cpu", "--size", "smoke"]
    script(
        tmp_path / "bin" / "compute-sanitizer", 'echo "sanitizing: $*"; [ "$2" = racecheck ] || { shift 4; exec "$@"; }'
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHON": sys.executable, "OUT": str(tmp_path / "out"), "TRITON_INTERPRET": "0"}
    environment["PATH"] = f"{tmp_path / 'bin'}:{environment['PATH']}"
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    (results,) = (tmp_path / "out").glob("*.json")
    content = json.loads(results.read_text())
    assert {row["extra_info"]["provider"] for row in content["benchmarks"]} >= {"bare products", "ours (cpu)", "eager"}
    assert all(row["extra_info"].get("bitwise", True) for row in content["benchmarks"])
    choices = json.loads((tmp_path / "cache" / "sst-fast" / "tuned.json").read_text())["choices"]
    assert len({json.dumps(choice["problem"], sort_keys=True) for choice in choices}) >= 4
    sanitized = [line for line in done.stdout.splitlines() if line.startswith("sanitizing: ")]
    assert len(set(sanitized)) == 8
    assert all(" --error-exitcode 9 " in line and " -m sst_fast.check " in line for line in sanitized)
    of_tool = [
        {line.partition(tool)[2] for line in sanitized if f" {tool} " in line} for tool in ("memcheck", "racecheck")
    ]
    assert of_tool[0] == of_tool[1]
    (folder,) = (path for path in (tmp_path / "out").iterdir() if path.is_dir())
    outcomes = {row["outcome"] for row in rows.read(folder / "tests.jsonl")}
    assert outcomes == ({"begun", "passed"} if torch.cuda.is_available() else {"begun", "skipped"})
    assert {row["verdict"] for row in json.loads((folder / "check.json").read_text())["rows"]} >= {"right"}
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.stdout.splitlines() == [
        f"== {stage}: done before"
        for stage in ("build", "check", "tests", "rows", "tune", "sanitizers", "more_tests", "profiles")
    ]


def test_a_stage_that_fails_or_takes_too_long_is_tried_again(tmp_path):
    """Building, by a mock of Python that tells of a GPU; the next stage is run all the same."""
    check_script = tmp_path / "bench" / "device_check.sh"
    script(check_script, (ROOT / "bench" / "device_check.sh").read_text())
    (tmp_path / "sst_fast").mkdir()
    python = """case "$*" in
        *identity*) echo mock-gpu ;;
        *get_device_capability*) echo 9.0a ;;
        *build_ext*) echo "$TORCH_CUDA_ARCH_LIST, $SST_FAST_FORCE_CUDA, $*"; $BUILDING ;;
        *) echo "$*" ;;
    esac"""
    script(tmp_path / "python", python)
    environment = os.environ | {"PYTHON": str(tmp_path / "python"), "OUT": str(tmp_path / "out"), "LIMIT": "3"}
    environment.pop("TORCH_CUDA_ARCH_LIST", None)
    told = []
    for building in ("exit 3", "sleep 60", "true", "false"):
        command = ["bash", str(check_script), "build", "check"]
        done = subprocess.run(command, env=environment | {"BUILDING": building}, capture_output=True, text=True)
        told.append((done.returncode, done.stdout.splitlines()))
        (folder,) = (tmp_path / "out").iterdir()
        folder.rename(folder.with_name("mock-gpu-2001-02-03"))  # begun on another day
    assert [status for status, _ in told] == [1, 1, 0, 0]
    assert all("9.0a, 1, setup.py build_ext --inplace" in lines for _, lines in told[:3])  # for the card that is there
    assert any(line.startswith("-m sst_fast.check --device cuda --json") for line in told[0][1])
    assert "== check: done before" in told[1][1]
    assert told[3][1] == ["== build: done before", "== check: done before"]
    (log,) = (tmp_path / "out").glob("mock-gpu-*/build.log")
    assert log.read_text().count("setup.py build_ext") == 3  # of every attempt


POISONED = """
import os, time
def test_a(): pass
def test_b(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_c(): pass
def test_d(): os._exit(7)
def test_e(): pass
"""


def test_what_a_test_has_spoilt_is_not_what_the_next_one_finds(tmp_path):
    """Processes follow one another until every test has an outcome; none is run twice."""
    (tmp_path / "test_it.py").write_text(POISONED)
    arguments = f"-q -p no:cacheprovider -p bench.resume --rootdir {tmp_path} -c {os.devnull} --outcomes {tmp_path}/outcomes.jsonl"
    command = [sys.executable, "-m", "pytest", *arguments.split(), str(tmp_path / "test_it.py")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = str(ROOT)
    done = [subprocess.run(command, env=environment, capture_output=True, text=True) for _ in range(4)]
    assert [process.returncode for process in done] == [2, 7, 1, 1], done[0].stdout + done[0].stderr
    assert "FAILED earlier test_it.py::test_d: the process died, or was stopped" in done[3].stdout
    found = rows.read(tmp_path / "outcomes.jsonl")
    last = {row["test"][-1]: row["outcome"] for row in found}
    assert last == {"a": "passed", "b": "failed", "c": "passed", "d": "failed", "e": "passed"}
    assert [row["test"][-1] for row in found if row["outcome"] == "begun"] == list("abcde")


def test_rows_go_on_where_they_were_and_a_crash_is_a_row(monkeypatch, tmp_path):
    file, started = tmp_path / "rows.jsonl", []

    def run(command, **options):
        started.append(int(command[-1]))
        if len(started) == 2:
            raise subprocess.TimeoutExpired(command, 1)
        return subprocess.CompletedProcess(command, -11 if len(started) == 1 else 0)

    monkeypatch.setattr(rows.subprocess, "run", run)
    monkeypatch.setattr(rows.timing, "bandwidth", lambda device: 1e9)
    rows.main([str(file), "--device", "cpu", "--size", "smoke", "--within", "-1"])
    assert started == []
    rows.main([str(file), "--device", "cpu", "--size", "smoke"])
    assert started == [0, 1, 2]
    told = [row["absent"] for row in rows.read(file) if "absent" in row]
    assert told == ["its process ended with status -11", "it was stopped after 150 s"]
    rows.main([str(file), "--device", "cpu", "--size", "smoke"])
    assert started == [0, 1, 2]


@needs_extension
def test_a_rivals_lack_of_memory_is_a_row(monkeypatch):
    greedy = providers.Provider(
        "greedy", lambda *_: "", lambda p, i: partial(refuse, torch.OutOfMemoryError("GPU full"))
    )
    wrong = providers.Provider("wrong", lambda *_: "", lambda p, i: lambda: [torch.zeros(())])
    monkeypatch.setattr(
        providers, "PROVIDERS", [greedy, wrong, *(p for p in providers.PROVIDERS if p.name == "ours (cpu)")]
    )
    problem = rows.Problem(8, 64, 32, task="forward")
    found = {row["provider"]: row for row in rows.measure(problem, CPU, "smoke", 0.0)}
    assert found["greedy"]["absent"] == "OutOfMemoryError: GPU full"
    assert "loss: relative error" in found["wrong"]["absent"]
    assert found["ours (cpu)"]["bitwise"]
    assert len(found["ours (cpu)"]["data"]) >= 3
    assert found["bare products"]["tflops"] > 0
