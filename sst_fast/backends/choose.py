"""Which implementation of an operation runs: what exists here, what is chosen, and why.

Force one per call (``backend="reference"``) or by the environment variable ``SST_FAST_BACKEND``: a name for every
operation (``reference``) or a list (``margin_softmax=reference,enqueue=cpu``).
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch

compiled: ModuleType | None
try:
    from sst_fast import _C as compiled  # type: ignore[attr-defined,no-redef]
except ImportError as error:
    compiled = None
    _why_not_compiled = f"the extension sst_fast._C cannot be imported ({error})"
    warnings.warn(f"sst_fast: {_why_not_compiled}; plain PyTorch serves instead, slower", RuntimeWarning, stacklevel=3)

OPERATIONS = ("margin_softmax", "enqueue", "dequeue")
# In order of preference. cuda_float8: the sweep of cuda, but with float8 products over a float8 queue, hence less exact.
NAMES = ("cuda", "triton", "cpu", "reference", "cuda_float8")
ENVIRONMENT = "SST_FAST_BACKEND"
ON_REQUEST = "available on request: not yet run on a GPU"


@dataclass(frozen=True)
class Choice:
    """What :func:`backends` says of one operation on one kind of device."""

    operation: str
    device: str
    implementations: dict[str, str]  # name -> "available" or why it is not
    chosen: str
    why: str

    def __str__(self) -> str:
        lines = [f"{self.operation} on {self.device}: {self.chosen} ({self.why})"]
        return "\n".join(lines + [f"    {name:<10} {state}" for name, state in self.implementations.items()])


def backends(device: str | torch.device | None = None) -> dict[str, Choice]:
    """For each operation, which implementations exist here, which one is chosen for ``device`` and why.

    Args:
        device: 'cpu' or 'cuda'; default: 'cuda' if a CUDA device is available.
    """
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    return {operation: _choice(operation, kind, None) for operation in OPERATIONS}


def choose(operation: str, device: torch.device, requested: str | None) -> str:
    """Name of the implementation to run on ``device``; ValueError if the requested one cannot."""
    return _choice(operation, device.type, requested).chosen


def _choice(operation: str, device: str, requested: str | None) -> Choice:
    states = {name: _state(name, operation, device) for name in NAMES}
    asked, source = (requested, "backend argument") if requested else (_from_environment(operation), ENVIRONMENT)
    if asked is None:
        # Interpreted kernels are for tests: only on request.
        names = [name for name in NAMES if name != "triton" or device == "cuda"]
        chosen = next(name for name in names if states[name] == "available")
        why = "the fastest one available" if chosen != "reference" else "nothing faster is available"
        return Choice(operation, device, states, chosen, why)
    if asked not in NAMES:
        raise ValueError(f"{source}: {asked!r} is no backend, expected one of {', '.join(NAMES)}")
    if states[asked] not in ("available", ON_REQUEST):
        raise ValueError(f"{source}: {operation} cannot run on {asked!r}: {states[asked]}")
    return Choice(operation, device, states, asked, f"forced by {source}")


def _from_environment(operation: str) -> str | None:
    value = os.environ.get(ENVIRONMENT, "").strip()
    if not value:
        return None
    if "=" not in value:
        return value
    table = {}
    for entry in value.split(","):
        name, _, backend = entry.partition("=")
        if name.strip() not in OPERATIONS:
            raise ValueError(
                f"{ENVIRONMENT}: {name.strip()!r} is no operation, expected one of {', '.join(OPERATIONS)}"
            )
        table[name.strip()] = backend.strip()
    return table.get(operation)


def _state(name: str, operation: str, device: str) -> str:
    if name == "reference":
        return "available"
    if name == "triton":
        return _triton_state(operation, device)
    if name == "cuda_float8":
        return _state("cuda", operation, device) if operation == "margin_softmax" else "not for the queue"
    if device != name:
        return f"not for {device} tensors"
    if compiled is None:
        return _why_not_compiled
    if name == "cuda" and compiled.cuda is None:
        return "sst_fast._C was built without CUDA"
    return _hopper_state() if name == "cuda" and operation == "margin_softmax" else "available"


def _hopper_state() -> str:
    if not compiled.sm90a:  # type: ignore[union-attr]
        return "sst_fast._C was built without sm_90a"
    if torch.cuda.get_device_capability() != (9, 0):
        return "for Hopper (sm_90) alone"
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton for what surrounds its sweep"
    return ON_REQUEST


def _triton_state(operation: str, device: str) -> str:
    if operation != "margin_softmax":
        return "not written: the queue is C++ and CUDA C++"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    return "available" if device == "cuda" or interpreted else f"not for {device} tensors (but with TRITON_INTERPRET=1)"


def implementation(backend: str, operation: str) -> Any:
    """The function that does ``operation`` on a compiled backend or in Triton."""
    if backend == "triton":
        from sst_fast.kernels import margin_softmax

        return getattr(margin_softmax, operation)
    if backend in ("cuda", "cuda_float8"):
        from sst_fast.kernels import hopper

        options: dict[str, Any] = {"float8_products": backend == "cuda_float8"}
        if operation == "fits":
            return partial(hopper.fits, **options)
        options["cuda_sweep"] = compiled.cuda_sweep  # type: ignore[union-attr]
        return partial(implementation("triton", operation), **options)
    return getattr(compiled, f"{backend}_{operation}")
