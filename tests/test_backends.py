"""Which implementation runs: what is reported, what can be forced, and life without the extension."""

import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

import sst_fast
from sst_fast.arguments import INTEGERS, NUMBERS, TENSORS
from sst_fast.backends import choose as decisions
from sst_fast.backends.backend import Problem
from sst_fast.backends.choose import OPERATIONS, choose
from sst_fast.backends.extension import compiled, explain
from sst_fast.functional import margin_softmax

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def decide_anew():
    """The environment is read when the first decision is made."""
    decisions.forget()
    yield
    decisions.forget()


def chosen(operation="margin_softmax", requested=None, **fields):
    return choose(Problem(operation, CPU)._replace(**fields), requested)


def test_every_operation_says_what_is_chosen_and_why():
    said = sst_fast.backends("cpu")
    assert set(said) == set(OPERATIONS)
    for choice in said.values():
        assert choice.implementations["reference"] == "available"
        assert choice.implementations[choice.chosen] == "available"
        assert choice.chosen in str(choice)
        assert choice.why


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_a_gpu_would_run_can_be_asked_without_one():
    for choice in sst_fast.backends("cuda", queue_dtype=torch.bfloat16).values():
        assert choice.chosen == "reference"
        assert choice.implementations["cpu"] == "PyTorch finds no CUDA device"


def test_forced_by_environment(monkeypatch):
    monkeypatch.setenv("SST_FAST_BACKEND", "reference")
    assert {chosen(operation) for operation in OPERATIONS} == {"reference"}
    assert "forced by SST_FAST_BACKEND" in str(sst_fast.backends("cpu")["enqueue"])
    monkeypatch.setenv("SST_FAST_BACKEND", "enqueue=reference, dequeue=reference")
    decisions.forget()
    assert chosen("enqueue") == "reference"
    monkeypatch.delenv("SST_FAST_BACKEND")
    assert chosen("enqueue") == "reference"  # it was read when the first decision was made
    decisions.forget()
    usual = chosen("margin_softmax")
    monkeypatch.setenv("SST_FAST_BACKEND", "enqueue=reference")
    decisions.forget()
    assert chosen("margin_softmax") == usual


def test_the_argument_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("SST_FAST_BACKEND", "cuda")
    assert chosen("enqueue", "reference") == "reference"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "fast",
            "SST_FAST_BACKEND: 'fast' is no backend, expected one of hopper, staged, triton, cuda, cpu, reference",
        ),
        ("cuda", "SST_FAST_BACKEND: margin_softmax cannot run on 'cuda': not for cpu tensors"),
        ("dance=cpu", "SST_FAST_BACKEND: 'dance' is no operation"),
    ],
)
def test_impossible_wishes_are_named(monkeypatch, value, message):
    monkeypatch.setenv("SST_FAST_BACKEND", value)
    with pytest.raises(ValueError, match=message):
        margin_softmax(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0]))


@pytest.mark.skipif(compiled is None, reason="the extension was not built")
def test_a_forced_backend_never_hands_on():
    """What is chosen is what runs: a backend that cannot do the problem says why."""
    pytest.importorskip("triton")
    x = torch.randn(4, 8, dtype=torch.float64)
    w = torch.nn.functional.normalize(torch.randn(9, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="cannot run on 'triton': float64 is more exact"):
        margin_softmax(x, w, torch.arange(4), backend="triton")
    wide = torch.nn.functional.normalize(torch.randn(9, 1030))
    with pytest.raises(ValueError, match=r"cannot run on 'triton': .*1030 features"):
        margin_softmax(torch.randn(4, 1030), wide, torch.arange(4), backend="triton")
    with pytest.raises(ValueError, match="cannot run on 'cpu': rounds no products"):
        margin_softmax(x, w, torch.arange(4), backend="cpu", product_dtype=torch.float8_e4m3fn)


@pytest.mark.skipif(compiled is None, reason="the extension was not built")
def test_python_and_cpp_list_the_same_arguments():
    assert compiled.arguments == [list(TENSORS), list(INTEGERS), list(NUMBERS)]


def test_the_core_never_imports_the_wings():
    package = Path(sst_fast.__file__).parent
    wings = ("data", "evaluation", "nn", "train")
    core = [*package.glob("*.py"), *(package / "backends").glob("*.py")]
    for file in core:
        if file.name == "cli.py":  # a name that stays for torchrun
            continue
        for line in file.read_text().splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]) and words[1].startswith("sst_fast"):
                assert not any(words[1].startswith(f"sst_fast.{wing}") for wing in wings), f"{file.name}: {line}"


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *code.split("\0")], env=os.environ | environment, capture_output=True, text=True, check=False,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip


def test_without_the_extension_plain_pytorch_serves_and_says_so_once():
    code = """
import sys; sys.modules["sst_fast._C"] = None
import torch, sst_fast
queue = sst_fast.GalleryQueue(8, 4)
criterion = sst_fast.SemiSiameseLoss(queue)
model = sst_fast.SemiSiamese(torch.nn.Linear(6, 4), criterion)
for _ in range(3):
    loss = model(torch.randn(3, 6), torch.randn(3, 6), torch.arange(3))
    loss.backward()
    model.update_gallery()
queue.dequeue(2)
print(len(queue), sst_fast.backends("cpu")["margin_softmax"].chosen, loss.isfinite().item())
"""
    done = run(f"-c\0{code}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["6", "reference", "True"]
    assert done.stderr.count("plain PyTorch serves, slower") == 1


SUFFIX = EXTENSION_SUFFIXES[0]
MISSING = ImportError("cannot import name '_C' from partially initialized module 'sst_fast' (most likely due to a circular import)")  # fmt: skip
SYMBOL = ImportError(f"/x/sst_fast/_C{SUFFIX}: undefined symbol: _ZN3c106detail14torchCheckFail")


@pytest.mark.parametrize(
    ("files", "error", "says"),
    [
        ([], MISSING, ["installed without its extension", "no C++ compiler", "SST_FAST_REQUIRE_EXTENSION=1 pip install"]),
        ([f"here/sst_fast/_C{SUFFIX}"], SYMBOL, ["built for another PyTorch", torch.__version__, "pip install"]),
        (["here/sst_fast/_C.cpython-27-sparc.so"], MISSING, ["built for another Python (_C.cpython-27-sparc.so)", "pip install"]),
        (["here/csrc/ops.h"], MISSING, ["source folder", "has not been built. Build it here: pip install"]),
        (["here/csrc/ops.h", f"site/sst_fast/_C{SUFFIX}"], MISSING, ["hides the one installed in", "Start Python in another folder"]),
    ],
    ids=["no compiler", "another torch", "another Python", "a checkout", "a checkout beside an installed package"],
)  # fmt: skip
def test_a_missing_extension_is_explained(tmp_path, files, error, says):
    (tmp_path / "here" / "sst_fast").mkdir(parents=True)
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    said = explain(error, tmp_path / "here" / "sst_fast", ["", str(tmp_path / "here"), str(tmp_path / "site")])
    assert all(part in said for part in says), said
    assert "circular" not in said
    assert "_ZN" not in said


# An editable installation would lend its own extension.
WITHOUT_EDITABLE = (
    "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')]"
)


def test_a_checkout_beside_an_installed_package_says_so(tmp_path):
    """Python itself, started in a copy of the sources."""
    root = Path(__file__).parent.parent
    shutil.copytree(
        root / "sst_fast", tmp_path / "sst_fast", ignore=shutil.ignore_patterns("_C.*", "__pycache__", "kernels")
    )
    (tmp_path / "csrc").mkdir()
    (tmp_path / "site" / "sst_fast").mkdir(parents=True)
    (tmp_path / "site" / "sst_fast" / f"_C{SUFFIX}").touch()
    done = subprocess.run(
        [sys.executable, "-c", f"{WITHOUT_EDITABLE}; import sst_fast; print(sst_fast.__file__)"], cwd=tmp_path, capture_output=True, text=True,
        check=True, env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
    )  # fmt: skip
    assert done.stdout.startswith(str(tmp_path / "sst_fast"))
    assert f"it hides the one installed in {tmp_path / 'site'}" in done.stderr


def test_an_old_setuptools_is_named(tmp_path):
    """Before anything else is imported; newer ones read pyproject.toml as it is."""
    (tmp_path / "setuptools.py").write_text("__version__ = '68.1.2.post0'\n")
    done = subprocess.run(
        [sys.executable, Path(__file__).parent.parent / "setup.py", "--version"], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == (
        "sst-fast: building needs setuptools 77 or newer, this is 68.1.2.post0; pip install --upgrade setuptools\n"
    )


@pytest.mark.skipif(compiled is None, reason="the extension was not built")
@pytest.mark.parametrize("name", ["generic", "avx2", "avx512", "avx512bf16"])
def test_every_instruction_set_gives_right_answers(name):
    """The variants this processor would not choose, in a process of their own."""
    if compiled.instruction_set() == name:
        pytest.skip("what this process runs by itself")
    ran = run("-c\0from sst_fast import _C; print(_C.instruction_set())", SST_FAST_CPU=name)
    if ran.stdout.strip() != name:
        pytest.skip(f"no {name} here")
    done = run(
        "-m\0pytest\0-q\0tests/test_margin_softmax.py\0tests/test_fuzz.py\0-k\0cpu and (sizes or wraps or extreme or fuzz)",
        SST_FAST_CPU=name,
    )
    assert done.returncode == 0, done.stdout
