"""Which backend computes what: what exists here, what is chosen, and why.

A *backend* is one implementation of the operations. It says of a problem whether it can compute it here
(:class:`sst_fast.backends.backend.Backend`). It is asked once for each kind of problem, and the answer is remembered. If ``sst-fast
tune`` has stored a choice for the problem (:mod:`sst_fast.backends.tuned`), that one is taken. Otherwise the first of
:data:`BACKENDS` that can compute it.

A backend can be forced for one call (``backend="reference"``), or by the environment variable ``SST_FAST_BACKEND``: a name for all
operations (``reference``) or a list (``margin_softmax=reference,enqueue=cpu``). The variable is read when the first decision is made.

If a GPU cannot run the kernels of a backend that was not forced, the next backend takes its place (:func:`attempt`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import torch

from sst_fast.backends import tuned
from sst_fast.backends.backend import Backend, Problem
from sst_fast.backends.cpu import Cpu
from sst_fast.backends.cuda import Cuda
from sst_fast.backends.hopper import Hopper
from sst_fast.backends.reference import Reference
from sst_fast.backends.staged import Staged
from sst_fast.backends.triton import Triton

OPERATIONS = ("margin_softmax", "enqueue", "dequeue", "window")
BACKENDS: dict[str, Backend] = {  # in order of preference
    "hopper": Hopper(), "staged": Staged(), "triton": Triton(), "cuda": Cuda(), "cpu": Cpu(), "reference": Reference(),
}  # fmt: skip
ENVIRONMENT = "SST_FAST_BACKEND"
NO_DEVICE = "PyTorch finds no CUDA device"
# Errors after which no other backend is tried: wrong arguments, what a backend does not do on purpose, and memory, of which the others
# need more.
NOT_REFUSED = (ValueError, TypeError, IndexError, NotImplementedError, torch.OutOfMemoryError)
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Choice:
    """What :func:`backends` says of one problem.

    Attributes:
        problem: the problem.
        implementations: name of each backend -> 'available', or why it cannot compute the problem.
        chosen: name of the backend that computes it.
        why: the reason for the choice, in words.
    """

    problem: Problem
    implementations: dict[str, str]
    chosen: str
    why: str

    @property
    def operation(self) -> str:
        """Name of the operation."""
        return self.problem.operation

    def __str__(self) -> str:
        lines = [f"{self.operation} on {self.problem.device}: {self.chosen} ({self.why})"]
        return "\n".join(lines + [f"    {name:<10} {state}" for name, state in self.implementations.items()])


def backends(device: str | torch.device | None = None, **problem: object) -> dict[str, Choice]:
    """For each operation, which backends exist here, which one runs a problem on ``device`` and why.

    Args:
        device: 'cpu', 'cuda' or 'cuda:N'; default: 'cuda' if a CUDA device is available.
        problem: fields of :class:`sst_fast.backends.backend.Problem` that differ from its defaults, such as
            ``queue_dtype=torch.bfloat16`` or ``trains_prototypes=True``.

    Returns:
        Operation -> :class:`Choice`, which ``print`` shows in words. Operations are 'margin_softmax' (the loss), 'enqueue', 'dequeue' and
        'window' (the queue).

    Raises:
        TypeError: a problem has no such field.
        ValueError: ``SST_FAST_BACKEND`` names a backend that does not exist or cannot compute the problem.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    unknown = set(problem) - set(Problem._fields[2:])
    if unknown:
        raise TypeError(
            f"backends: {sorted(unknown)[0]!r} is no field of a problem, expected one of {Problem._fields[2:]}"
        )
    return {name: _decide(Problem(name, where)._replace(**problem), None) for name in OPERATIONS}  # type: ignore[arg-type]


def choose(fields: tuple[Any, ...], requested: str | None = None) -> str:
    """Name of the backend that runs a problem; ValueError with the reason if the requested one cannot.

    A graph of torch.compile keeps the decision as a constant. How it is made is not traced.

    Args:
        fields: of the :class:`Problem`, the first of them or all, as a plain tuple or as the problem itself.
        requested: the backend that was asked for by name, or None.
    """
    name = _decisions.get((fields, requested))
    if name is None:
        name = _decisions[fields, requested] = _decide(Problem(*fields), requested).chosen
        BACKENDS[name].load()
    return name


# What torch.compiler.assume_constant_result does, without importing the compiler, which takes seconds.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]

_decisions: dict[tuple[tuple[Any, ...], str | None], str] = {}  # (fields of a problem, what was asked for) -> backend
_refused: dict[tuple[str, Problem], str] = {}  # (backend, problem of any size) -> why
_told: set[str] = set()


def attempt(fields: tuple[Any, ...], requested: str | None, run: Callable[[str], _Result]) -> _Result:
    """``run(name)`` for the backend that :func:`choose` names. If a GPU cannot run its kernels: a warning, and the next backend.

    The kernels' error is raised where the backend was asked for by name, and in a graph of torch.compile, which keeps its decision.

    Args:
        fields: of the :class:`Problem`, the first of them or all: a plain tuple, because it is made and looked up in every call.
        requested: the backend that was asked for by name, or None.
        run: does the work by the backend of that name.
    """
    if torch.compiler.is_compiling():
        return run(choose(fields, requested))
    while True:
        name = choose(fields, requested)
        try:
            return run(name)
        except Exception as error:
            if not _hands_on(name, Problem(*fields), requested, error):
                raise


def _hands_on(name: str, problem: Problem, requested: str | None, error: Exception) -> bool:
    """Whether another backend can serve instead; if so, this one is not chosen for such problems again."""
    forced = requested is not None or problem.operation in _environment()
    if forced or not BACKENDS[name].launches or isinstance(error, NOT_REFUSED) or not _answers(problem.device):
        return False
    kind = problem._replace(probes=0, slots=0)
    words = " ".join(str(error).split())
    reason = f"{type(error).__name__}: {words[:300]}"
    _refused[name, kind] = f"failed here: {reason}"
    for key in [key for key in _decisions if Problem(*key[0])._replace(probes=0, slots=0) == kind]:
        del _decisions[key]
    try:
        instead = _decide(problem, None).chosen
    except ValueError:  # nobody else can
        return False
    card = torch.cuda.get_device_name(problem.device) if problem.device.type == "cuda" else tuned.processor()
    message = f"sst_fast: {problem.operation} by {name!r} does not run on {card} ({reason}); {instead!r} serves instead"
    if message not in _told:
        _told.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return True


def _answers(device: torch.device) -> bool:
    """Whether the device still works: after an illegal access nothing does, and the first error is the one to see."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def forget() -> None:
    """Forgets all decisions. The next one reads the environment and the stored choices again."""
    _decisions.clear()
    _refused.clear()
    _told.clear()
    _environment.cache_clear()
    tuned.forget()


def _decide(problem: Problem, requested: str | None) -> Choice:
    missing = problem.device.type == "cuda" and not torch.cuda.is_available()  # then no backend can look at the device
    states = {
        name: (NO_DEVICE if missing and name != "reference" else backend.why_not(problem)) or "available"
        for name, backend in BACKENDS.items()
    }
    asked, source = requested, "backend argument"
    if asked is None:
        asked, source = _environment().get(problem.operation), ENVIRONMENT
    if asked is None:
        kind = problem._replace(probes=0, slots=0)
        states = {
            name: _refused.get((name, kind), state) if state == "available" else state for name, state in states.items()
        }
        able = [name for name, state in states.items() if state == "available"]
        stored = None if missing else tuned.choice(problem)
        if stored in able:
            return Choice(problem, states, stored, "the fastest that sst-fast tune has measured here")
        chosen = next((name for name in able if BACKENDS[name].volunteers(problem)), None)
        if chosen is None:
            raise ValueError(f"product_dtype: no backend can round products here: {states}")
        why = "the fastest one available" if chosen != "reference" else "nothing faster is available"
        return Choice(problem, states, chosen, why)
    if asked not in BACKENDS:
        raise ValueError(f"{source}: {asked!r} is no backend, expected one of {', '.join(BACKENDS)}")
    if states[asked] != "available":
        raise ValueError(f"{source}: {problem.operation} cannot run on {asked!r}: {states[asked]}")
    return Choice(problem, states, asked, f"forced by {source}")


@lru_cache(maxsize=1)
def _environment() -> dict[str, str]:
    """Operation -> backend, as ``SST_FAST_BACKEND`` has it."""
    value = os.environ.get(ENVIRONMENT, "").strip()
    if not value:
        return {}
    if "=" not in value:
        return dict.fromkeys(OPERATIONS, value)
    table = {}
    for entry in value.split(","):
        name, _, backend = entry.partition("=")
        if name.strip() not in OPERATIONS:
            raise ValueError(
                f"{ENVIRONMENT}: {name.strip()!r} is no operation, expected one of {', '.join(OPERATIONS)}"
            )
        table[name.strip()] = backend.strip()
    return table
