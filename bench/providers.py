"""Everything that can compute a problem: ours and the others', each in its best documented configuration.

A provider's ``why_not`` says why it cannot compute a problem here ('' if it can), ``make`` gives a function that returns the
loss and the gradients that the task wants. Whatever a provider prepares before its first step (a layer's parameters, a filled
memory) is prepared in ``make``, outside the timing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.problems import MARGINS, SCALE, Inputs, Problem
from sst_fast.backends.backend import Problem as SelectionProblem
from sst_fast.backends.choose import BACKENDS
from sst_fast.functional import margin_softmax
from sst_fast.timing import bare_products

Run = Callable[[], list[Tensor]]
NO_FLOAT8 = "no float8 queue"


@dataclass(frozen=True)
class Provider:
    """One contender."""

    name: str
    why_not: Callable[[Problem, torch.device], str]
    make: Callable[[Problem, Inputs], Run]


def finish(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Loss and gradients."""
    return [loss.detach(), *(torch.autograd.grad(loss, leaves) if leaves else ())]


def missing(package: str) -> str:
    """'' if it can be imported, else why not."""
    try:
        importlib.import_module(package)
    except Exception as error:
        return f"{package} is not installed" if isinstance(error, ModuleNotFoundError) else f"{package}: {error}"
    return ""


# --- ours ---------------------------------------------------------------------------------------------------------------


def ours(backend: str) -> Provider:
    """The fused loss by one backend."""

    def why_not(problem: Problem, device: torch.device) -> str:
        asked = SelectionProblem(
            "margin_softmax", device, problem.probe_dtype, problem.torch_dtype, problem.d, window=problem.sst,
            trains_prototypes=problem.task == "prototypes", normalize=problem.task == "prototypes",
        )  # fmt: skip
        reason = BACKENDS[backend].why_not(asked)
        if reason:
            return reason
        if backend in ("staged", "triton") and device.type == "cpu":
            return "its interpreter is not for timing"
        if backend == "reference" and problem.n * problem.k > 2**24:
            return "the reference is for small sizes"
        return ""

    def make(problem: Problem, inputs: Inputs) -> Run:
        options: dict[str, Any] = {"normalize_prototypes": problem.task == "prototypes"}
        if problem.sst:
            options |= {"window": inputs.window, "identity": inputs.identity, "slot_identity": inputs.slot_identity}
        margin, leaves = MARGINS[problem.margin], inputs.leaves(problem, low=True)

        def run() -> list[Tensor]:
            loss = margin_softmax(
                inputs.x_low, inputs.w_low, inputs.target, margin=margin, scale=SCALE, backend=backend, **options
            )
            return finish(loss, leaves)

        return run

    return Provider(f"ours ({backend})", why_not, make)


# --- written out in PyTorch ----------------------------------------------------------------------------------------------


def plain_loss(problem: Problem, x: Tensor, w: Tensor, target: Tensor, identity: Tensor, slots: Tensor) -> Tensor:
    """Normalise, all logits, margin on the target's, false negatives masked, cross-entropy."""
    cosines = F.linear(F.normalize(x), F.normalize(w) if problem.task == "prototypes" else w)
    at = cosines.gather(1, target[:, None])
    if problem.sst:
        cosines = cosines.masked_fill(identity[:, None] == slots[None, :], -torch.inf)
    margined = MARGINS[problem.margin].psi(at).to(cosines.dtype)
    return F.cross_entropy(SCALE * cosines.scatter(1, target[:, None], margined), target)


def as_the_authors(problem: Problem, inputs: Inputs, x: Tensor, w: Tensor) -> Tensor:
    """Both directions one after the other, the queue cloned for each; a single one for a plain loss."""
    if not problem.sst:
        return plain_loss(problem, x, w, inputs.target, inputs.identity, inputs.slot_identity)
    assert inputs.window is not None
    slots, own = inputs.window.slots, inputs.window.identities
    losses = []
    for probes, features in zip(x.chunk(2), inputs.features, strict=True):
        mine, labels = w.clone(), inputs.slot_identity.clone()
        mine[slots] = features
        labels[slots] = own
        losses.append(plain_loss(problem, probes, mine, slots, own, labels))
    return 0.5 * (losses[0] + losses[1])


def written_out(name: str, compiled: bool) -> Provider:
    """Eager PyTorch, under autocast for half precision; or the same under torch.compile."""

    def why_not(problem: Problem, device: torch.device) -> str:
        if problem.dtype == "float8_e4m3fn":
            return NO_FLOAT8
        if problem.n * problem.k * 4 > 2**32:
            return "its logits take more than 4 GiB"
        return "torch.compile of very large logits" if compiled and problem.n * problem.k > 2**28 else ""

    def make(problem: Problem, inputs: Inputs) -> Run:
        leaves = inputs.leaves(problem, low=False)
        function = as_the_authors
        if compiled:
            torch.compiler.reset()
            function = torch.compile(as_the_authors)

        def run() -> list[Tensor]:
            with torch.autocast(inputs.x.device.type, torch.bfloat16, enabled=problem.half):
                loss = function(problem, inputs, inputs.x, inputs.w)
            return finish(loss, leaves)

        return run

    return Provider(name, why_not, make)


def partial_fc(problem: Problem, inputs: Inputs) -> Run:
    """insightface's partial FC on one process, all classes sampled: margin under no_grad, its own softmax cross-entropy."""
    leaves = inputs.leaves(problem, low=False)
    margin = MARGINS[problem.margin]

    def run() -> list[Tensor]:
        with torch.autocast(inputs.x.device.type, torch.bfloat16, enabled=problem.half):
            logits = F.linear(F.normalize(inputs.x), F.normalize(inputs.w)).clamp(-1, 1)
        logits = logits.float()
        with torch.no_grad():
            shift = margin.psi(logits.gather(1, inputs.target[:, None])) - logits.gather(1, inputs.target[:, None])
        loss = F.cross_entropy(SCALE * logits.scatter_add(1, inputs.target[:, None], shift), inputs.target)
        return finish(loss, leaves)

    return run


# --- libraries -----------------------------------------------------------------------------------------------------------


def only_plain(
    margins: tuple[str, ...], tasks: tuple[str, ...] = ("forward", "gradient", "prototypes")
) -> Callable[..., str]:
    """What most libraries can do: no window, no masks, few margins."""

    def why_not(problem: Problem, device: torch.device) -> str:
        if problem.dtype == "float8_e4m3fn":
            return NO_FLOAT8
        if problem.sst:
            return "no batch window, no masks"
        if problem.margin not in margins:
            return f"no margin {problem.margin}"
        return "" if problem.task in tasks else f"no {problem.task}"

    return why_not


def needs(package: str, rest: Callable[..., str], device_type: str = "") -> Callable[[Problem, torch.device], str]:
    """Also a package, and perhaps a kind of device."""

    def why_not(problem: Problem, device: torch.device) -> str:
        if device_type and device.type != device_type:
            return f"needs {device_type}"
        return rest(problem, device) or missing(package)

    return why_not


def linear_loss(
    function: Callable[[Tensor, Tensor, Tensor], Tensor], am: bool = False
) -> Callable[[Problem, Inputs], Run]:
    """A library's fused linear cross-entropy ``function(x, weight, target)``, of scale times unit vectors.

    ``am``: it gives losses [n] of a plain softmax, from which an AM-softmax follows: with l the plain loss of a row, the other
    slots' share is e^l - 1, and lowering the target logit by s m multiplies it by e^(s m): log(1 + e^(s m) (e^l - 1)).
    """

    def make(problem: Problem, inputs: Inputs) -> Run:
        leaves = inputs.leaves(problem, low=True)

        def run() -> list[Tensor]:
            x = (SCALE * F.normalize(inputs.x_low.float())).to(inputs.x_low.dtype)
            w = inputs.w_low
            if problem.task == "prototypes":
                w = F.normalize(w.float()).to(w.dtype)
            loss = function(x, w, inputs.target)
            if am:
                shift = SCALE * 0.35 * (problem.margin == "am")
                loss = torch.log1p(torch.expm1(loss.float()) * torch.exp(torch.tensor(shift))).mean()
            return finish(loss, leaves)

        return run

    return make


def torch_linear(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    """PyTorch's, the path that keeps all logits (its 2.15 has a native kernel on sm_80 and later here)."""
    loss: Tensor = F.linear_cross_entropy(x, w, target)
    return loss


def torch_chunked(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    """PyTorch's, chunked."""
    loss: Tensor = F.linear_cross_entropy(x, w, target, options=torch.nn.LinearCrossEntropyOptions())
    return loss


def torch_has(*names: str) -> Callable[[Problem, torch.device], str]:
    """A plain softmax, where this PyTorch has it."""
    plain = only_plain(("softmax",))

    def why_not(problem: Problem, device: torch.device) -> str:
        absent = [n for n in names if not (hasattr(F, n) or hasattr(torch.nn, n))]
        return plain(problem, device) or (f"this PyTorch has no {absent[0]}" if absent else "")

    return why_not


def flash(problem: Problem, inputs: Inputs) -> Run:
    """CPU flash attention with key = value = queue: its output is the weighted mean of the prototypes, so that loss and
    gradient follow from one pass."""

    def run() -> list[Tensor]:
        x = inputs.x_low.detach()
        norm = x.float().norm(dim=1, keepdim=True)
        unit = (x.float() / norm).to(x.dtype)
        mean, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            unit[None, None], inputs.w_low[None, None], inputs.w_low[None, None], scale=SCALE
        )
        own = inputs.w_low[inputs.target].float()
        loss = (lse[0, 0] - SCALE * (unit.float() * own).sum(1)).mean()
        gradient = SCALE / len(x) * (mean[0, 0].float() - own)
        unit = unit.float()
        return [loss, (gradient - (gradient * unit).sum(1, keepdim=True) * unit) / norm]

    return run


def flash_why_not(problem: Problem, device: torch.device) -> str:
    """On the CPU, a plain softmax with gradient."""
    if device.type != "cpu":
        return "on the CPU only"
    return only_plain(("softmax",), ("gradient",))(problem, device)


def metric_learning_head(problem: Problem, inputs: Inputs) -> Run:
    """pytorch-metric-learning's CosFaceLoss or ArcFaceLoss, with these prototypes as its weights."""
    from pytorch_metric_learning import losses

    if problem.margin == "am":
        head = losses.CosFaceLoss(problem.k, problem.d, margin=0.35, scale=SCALE)
    else:
        head = losses.ArcFaceLoss(problem.k, problem.d, margin=28.647889756541161, scale=SCALE)  # degrees
    head.W.data = inputs.w.detach().T
    head.W.requires_grad_(problem.leaves > 1)

    def run() -> list[Tensor]:
        with torch.autocast(inputs.x.device.type, torch.bfloat16, enabled=problem.half):
            loss = head(inputs.x, inputs.target)
        found = finish(loss, [inputs.x, head.W][: problem.leaves])
        return found[:2] + [g.T for g in found[2:]]

    return run


def cross_batch_memory(problem: Problem, inputs: Inputs) -> Run:
    """pytorch-metric-learning's CrossBatchMemory with NTXentLoss, which with one positive a probe is a softmax over the
    memory. Nothing is enqueued while it is timed."""
    from pytorch_metric_learning import losses

    memory = losses.CrossBatchMemory(losses.NTXentLoss(temperature=1 / SCALE), problem.d, memory_size=problem.k)
    memory.embedding_memory = inputs.w.detach().clone()
    memory.label_memory = torch.arange(problem.k, device=inputs.w.device)
    memory.has_been_filled = True
    nothing = torch.zeros(problem.n, dtype=torch.bool, device=inputs.w.device)

    def run() -> list[Tensor]:
        return finish(memory(inputs.x, inputs.target, enqueue_mask=nothing), inputs.leaves(problem, low=False))

    return run


def memory_why_not(problem: Problem, device: torch.device) -> str:
    """float32 only (its masks do not fit autocast's dtype); n x (n k) pairs."""
    if problem.dtype != "float32":
        return "float32 only"
    if problem.n * problem.n * problem.k * 4 > 2**30:
        return "a row of pairs for each positive: more than 1 GiB"
    return only_plain(("softmax",), ("forward", "gradient"))(problem, device)


def liger(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    """Liger's chunked form (Triton). It computes the gradients in its forward pass."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss: Tensor = liger_fused_linear_cross_entropy(x, w, target)
    return loss


def liger_scaled(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    """Liger's scaled cross-entropy: its own kernel on Hopper."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    loss: Tensor = LigerFusedLinearScaledCrossEntropyFunction.apply(x, w, target).mean()
    return loss


def cut(reduction: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Apple's Cut Cross-Entropy, its exact form where the version has one."""

    def function(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
        import cut_cross_entropy

        exact = hasattr(getattr(cut_cross_entropy, "LinearCrossEntropyImpl", None), "CCE_EXACT")
        loss: Tensor = cut_cross_entropy.linear_cross_entropy(
            x, w, target, reduction=reduction, impl="cce_exact" if exact else "cce"
        )
        return loss

    return function


def quack(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    """QuACK's chunked linear cross-entropy (it picks its pipeline). It computes the gradients in its forward pass."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    loss: Tensor = chunked_linear_cross_entropy(x, w, target)
    return loss


def half_only(rest: Callable[[Problem, torch.device], str]) -> Callable[[Problem, torch.device], str]:
    """Kernels for half precision."""
    return lambda problem, device: rest(problem, device) if problem.half else "half precision only"


WITH_GRADIENT = ("gradient", "prototypes")  # of those that cannot leave it out
HEADS = only_plain(("am", "arc"))
SOFTMAX = only_plain(("softmax",))

PROVIDERS: list[Provider] = [
    *(ours(backend) for backend in BACKENDS),
    written_out("eager", compiled=False),
    written_out("torch.compile", compiled=True),
    Provider("torch linear_cross_entropy", torch_has("linear_cross_entropy"), linear_loss(torch_linear)),
    Provider(
        "torch linear_cross_entropy, chunked", torch_has("linear_cross_entropy", "LinearCrossEntropyOptions"),
        linear_loss(torch_chunked),
    ),
    Provider("flash attention, key = value", flash_why_not, flash),
    Provider("pytorch-metric-learning", needs("pytorch_metric_learning", HEADS), metric_learning_head),
    Provider("CrossBatchMemory + NTXent", needs("pytorch_metric_learning", memory_why_not), cross_batch_memory),
    Provider("partial FC, plain", only_plain(("am",), ("prototypes",)), partial_fc),
    Provider(
        "Liger", needs("liger_kernel", only_plain(("softmax",), WITH_GRADIENT), "cuda"), linear_loss(liger)
    ),
    Provider("Liger scaled", needs("liger_kernel", half_only(SOFTMAX), "cuda"), linear_loss(liger_scaled)),
    Provider("Cut Cross-Entropy", needs("cut_cross_entropy", half_only(SOFTMAX), "cuda"), linear_loss(cut("mean"))),
    Provider(
        "Cut Cross-Entropy, corrected", needs("cut_cross_entropy", half_only(only_plain(("am",))), "cuda"),
        linear_loss(cut("none"), am=True),
    ),
    Provider(
        "QuACK", needs("quack", half_only(only_plain(("softmax",), WITH_GRADIENT)), "cuda"), linear_loss(quack)
    ),
]  # fmt: skip


def bare(problem: Problem, inputs: Inputs) -> Callable[[], object]:
    """The limit: the library's own products of that size and dtype, as many as the task needs, outputs allocated once."""
    return bare_products(F.normalize(inputs.x.detach()), inputs.w_low.detach(), problem.products)
