"""What is measured: sizes, margin, task; and the tensors that every provider gets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sst_fast import AMSoftmax, ArcSoftmax, GalleryQueue, Margin, Softmax
from sst_fast.functional import Window, margin_softmax

SCALE = 30.0
MARGINS: dict[str, Margin] = {"softmax": Softmax(), "am": AMSoftmax(0.35), "arc": ArcSoftmax(0.5)}


@dataclass(frozen=True)
class Case:
    """A contender's turn at a problem, of whatever kind the suite has."""

    problem: Any
    provider: str

    def __str__(self) -> str:
        return f"{self.problem}-{self.provider}"


@dataclass(frozen=True)
class Problem:
    """One loss to compute.

    Attributes:
        n, k, d: probes, queue slots, features.
        dtype: of the products: 'float32', 'tf32', 'bfloat16', or 'float8_e4m3fn' (of a float8 queue, with float32 probes).
        margin: 'softmax', 'am' (0.35) or 'arc' (0.5), at scale 30.
        task: 'forward' (loss alone), 'gradient' (for the probes too), 'prototypes' (and for the prototypes, normalised inside).
        sst: the loss of Semi-Siamese Training: both directions against one queue, each with the other's features in the
            batch's slots, identity mask on. Else a plain loss of n probes against k rows, which more libraries can compute.
        threads: of the CPU; 0: all.
    """

    n: int
    k: int
    d: int = 512
    dtype: str = "float32"
    margin: str = "am"
    task: str = "gradient"
    sst: bool = True
    threads: int = 0

    def __str__(self) -> str:
        kind = "sst" if self.sst else "plain"
        threads = f"-threads{self.threads}" if self.threads else ""
        return f"{kind}-{self.margin}-{self.task}-{self.dtype}-n{self.n}-k{self.k}-d{self.d}{threads}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the products."""
        dtype: torch.dtype = torch.float32 if self.dtype == "tf32" else getattr(torch, self.dtype)
        return dtype

    @property
    def probe_dtype(self) -> torch.dtype:
        """Of the embeddings."""
        return torch.float32 if self.torch_dtype == torch.float8_e4m3fn else self.torch_dtype

    @property
    def half(self) -> bool:
        """Whether plain code computes it under autocast."""
        return self.dtype == "bfloat16"

    @property
    def products(self) -> int:
        """Matrix products of 2 n k d operations that the task needs if no logits are kept."""
        return {"forward": 1, "gradient": 2, "prototypes": 4}[self.task]

    @property
    def leaves(self) -> int:
        """How many of (embeddings, prototypes) get a gradient."""
        return {"forward": 0, "gradient": 1, "prototypes": 2}[self.task]


@dataclass
class Inputs:
    """x [n, d] and w [k, d] in float32 as masters, x_low and w_low in the problem's dtype; w's rows are unit vectors but for
    trainable prototypes. Leaves require grad as the task wants."""

    x: Tensor
    w: Tensor
    x_low: Tensor
    w_low: Tensor
    target: Tensor
    identity: Tensor  # of the probes
    slot_identity: Tensor  # [k]
    window: Window | None

    @property
    def features(self) -> Tensor:
        """What the two groups of probes see in the batch's slots, [2, n / 2, d], float32."""
        assert self.window is not None
        return self.window.features.float()

    def leaves(self, problem: Problem, low: bool) -> list[Tensor]:
        """Those that get a gradient."""
        return ([self.x_low, self.w_low] if low else [self.x, self.w])[: problem.leaves]


def make(problem: Problem, device: torch.device, seed: int = 0) -> Inputs:
    """Inputs by seed, the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    n, k, d, dtype = problem.n, problem.k, problem.d, problem.torch_dtype
    rows = torch.empty(k, d)
    for part in rows.split(65536):
        part.normal_(generator=generator)
    if problem.task != "prototypes":
        rows = F.normalize(rows)
    window, identity = None, torch.arange(n)
    x = torch.randn(n, d, generator=generator)
    if problem.sst:
        queue = GalleryQueue(k, d, dtype)
        queue.enqueue(rows, torch.arange(k))
        queue.state[0] = k // 3  # a window in the middle
        features = F.normalize(torch.randn(2, n // 2, d, generator=generator), dim=-1)
        window = queue.window(features, torch.arange(k, k + n // 2))
        x = features.flatten(0, 1) + 2 * d**-0.5 * x  # cosines with the target about 0.4
        target, identity, slot_identity = window.slots.repeat(2), window.identities.repeat(2), queue.identities
        rows = queue.features.float()
        window = Window(*(value if value is None else value.to(device) for value in window))
    else:
        target = torch.randperm(k, generator=generator)[:n] if n <= k else torch.randint(k, (n,), generator=generator)
        slot_identity = torch.arange(k)
    x, w = x.to(device), rows.to(device)
    needs = problem.leaves
    return Inputs(
        x.clone().requires_grad_(needs > 0), w.requires_grad_(needs > 1),
        x.to(problem.probe_dtype).requires_grad_(needs > 0), w.detach().to(dtype).requires_grad_(needs > 1),
        target.to(device), identity.to(device), slot_identity.to(device), window,
    )  # fmt: skip


def small(problem: Problem, probes: int = 32) -> Problem:
    """The same with fewer probes: what results are compared on."""
    return replace(problem, n=min(problem.n, probes))


def expected(problem: Problem, inputs: Inputs) -> list[Tensor]:
    """Loss and gradients by the plain reference in float64."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in (inputs.x_low, inputs.w_low)]
    options: dict[str, object] = {"normalize_prototypes": problem.task == "prototypes"}
    if inputs.window is not None:
        window = Window(
            inputs.window.features.double(), *(getattr(inputs.window, n) for n in ("identities", "start", "slots"))
        )
        options |= {"window": window, "identity": inputs.identity, "slot_identity": inputs.slot_identity}
    wanted = leaves[: problem.leaves]
    loss = margin_softmax(
        leaves[0], leaves[1] if problem.leaves > 1 else leaves[1].detach(), inputs.target,
        margin=MARGINS[problem.margin], scale=SCALE, backend="reference", **options,
    )  # type: ignore[arg-type]  # fmt: skip
    return [loss.detach(), *(torch.autograd.grad(loss, wanted) if wanted else ())]


def compare(problem: Problem, found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest relative error of loss and gradients; AssertionError if it is above what the dtype explains.

    Under bfloat16 autocast plain code rounds logits of up to the scale to 8 bits, and a logit's error is its gradient's relative
    error; float32 sums of a thousand products are good to 1e-4 after the same magnification.
    """
    tolerance = {"float32": 1e-4, "tf32": SCALE * 2**-10}.get(problem.dtype, SCALE * 2**-8)
    names = ("loss", "gradient of the embeddings", "gradient of the prototypes")
    assert len(found) == len(wanted), f"{len(found) - 1} gradients instead of {len(wanted) - 1}"
    errors = {}
    for name, a, b in zip(names, found, wanted, strict=False):
        errors[name] = float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= tolerance, f"{worst}: relative error {errors[worst]:.2g} above {tolerance:.2g}"
    return errors[worst]
