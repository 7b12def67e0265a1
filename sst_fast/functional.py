"""The fused loss as a function: checks its arguments, picks a backend, calls the operator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from sst_fast import ops, reference
from sst_fast.backends.choose import choose, implementation
from sst_fast.margins import AMSoftmax, Margin, Parameter

Reduction = Literal["none", "mean", "sum"]
GradientRule = Literal["exact", "straight_through"]

EMBEDDING_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
QUEUE_DTYPES = (*EMBEDDING_DTYPES, torch.float8_e4m3fn)


@dataclass(frozen=True)
class Window:
    """The slots that a batch is about to take, and what each group of its probes sees there.

    Attributes:
        features: [H, B, D]: probes are split into H equal groups, group h sees ``features[h]`` in these slots.
        identities: int64 [B].
        start: int64, 0-d: first of the B slots; they wrap round the end of the queue.
        slots: int64 [B]: their numbers, the targets of the batch's probes.
    """

    features: Tensor
    identities: Tensor
    start: Tensor
    slots: Tensor


class Statistics(NamedTuple):
    """What the sweep over the queue saw, per probe, each [N], without gradient.

    ``lse`` log-sum-exp of all logits, ``target_cosine``, ``hardest_cosine`` of the slots that are neither target nor
    masked (-inf if there is none) and its ``hardest_slot`` (-1), ``beats_target``: how many of them exceed the target.
    """

    lse: Tensor
    target_cosine: Tensor
    hardest_cosine: Tensor
    hardest_slot: Tensor
    beats_target: Tensor


@overload
def margin_softmax(
    embedding: Tensor, prototypes: Tensor, target: Tensor, *, margin: Margin = ..., scale: Parameter = ...,
    reduction: Reduction = ..., weight: Tensor | None = ..., ignore_index: int = ..., label_smoothing: float = ...,
    window: Window | None = ..., identity: Tensor | None = ..., slot_identity: Tensor | None = ...,
    mask_empty: bool = ..., normalize_prototypes: bool = ..., gradient: GradientRule = ...,
    return_statistics: Literal[False] = ..., backend: str | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def margin_softmax(
    embedding: Tensor, prototypes: Tensor, target: Tensor, *, margin: Margin = ..., scale: Parameter = ...,
    reduction: Reduction = ..., weight: Tensor | None = ..., ignore_index: int = ..., label_smoothing: float = ...,
    window: Window | None = ..., identity: Tensor | None = ..., slot_identity: Tensor | None = ...,
    mask_empty: bool = ..., normalize_prototypes: bool = ..., gradient: GradientRule = ...,
    return_statistics: Literal[True], backend: str | None = ...,
) -> tuple[Tensor, Statistics]: ...  # fmt: skip


def margin_softmax(
    embedding: Tensor,
    prototypes: Tensor,
    target: Tensor,
    *,
    margin: Margin = AMSoftmax(0.35),
    scale: Parameter = 30.0,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    window: Window | None = None,
    identity: Tensor | None = None,
    slot_identity: Tensor | None = None,
    mask_empty: bool = True,
    normalize_prototypes: bool = False,
    gradient: GradientRule = "exact",
    return_statistics: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Statistics]:
    """Margin-softmax of probes over a gallery queue (Du et al., Semi-Siamese Training, ECCV 2020), in one sweep over the queue.

    With c_ij the cosine of probe i and slot j and a_i that of its target slot y_i,

        loss_i = -s psi(a_i) + log( exp(s psi(a_i)) + sum over unmasked j != y_i of exp(s phi(c_ij)) ).

    No N x K tensor is ever made. The gradient for ``embedding`` is found in the same sweep. ``prototypes`` get one if they
    require it, by a second sweep in backward (in plain PyTorch together with ``window``). Compiled backends have no second
    derivative. Under autocast ``embedding`` and float32 ``prototypes`` are cast as for a linear layer; the loss stays float32.

    Args:
        embedding: probes [N, D], float64, float32, bfloat16 or float16; normalised inside. A zero row has cosine 0
            with everything and gradient 0.
        prototypes: [K, D], same device, float64, float32, bfloat16, float16 or (without gradient) float8_e4m3fn; taken as
            they are: rows should have norm 1 (those of a queue do).
        target: int64 [N], row numbers of ``prototypes``.
        margin: a margin of :mod:`sst_fast.margins`; its parameters may be tensors [N], one value per probe.
        scale: s > 0, the inverse temperature: a number, a 0-d tensor or a tensor [N] (no gradient).
        reduction: 'mean' (default), 'sum' or 'none' (float32 [N]; float64 if an input is).
        weight: [N], floating point, multiplies each probe's loss; 'mean' then divides by the sum of weights.
        ignore_index: probes with this target have loss 0 and gradient 0 and do not count in the mean (0 if none does).
        label_smoothing: e in [0, 1): a share e of each probe's target distribution is spread evenly over its unmasked
            slots, the target among them (Szegedy et al., CVPR 2016). Its gradient takes one more sweep.
        window: the batch's own slots, from :meth:`sst_fast.GalleryQueue.window`: replaces those rows of
            ``prototypes`` for this call, differently for each group of probes.
        identity: int64 [N]. With ``slot_identity``, a slot of the probe's own identity that is not its target is no
            negative and is masked.
        slot_identity: int64 [K], -1 for an empty slot.
        mask_empty: mask slots with identity -1 (needs ``slot_identity``).
        normalize_prototypes: divide rows of ``prototypes`` by their norm inside the sweep; their gradient follows.
        gradient: 'exact', or 'straight_through': psi' = phi' = 1, as of heads that apply the margin under ``no_grad``
            (insightface's), for parity with them.
        return_statistics: also return :class:`Statistics`.
        backend: force an implementation, see :func:`sst_fast.backends`. 'cuda_float8' alone is approximate: over a float8
            queue it rounds probes and weights to float8 as well: cosines are off by up to 0.1 / sqrt(D). Where
            'cuda' or 'cuda_float8' cannot do something (other D, label smoothing, trained or unnormalised prototypes),
            Triton does it.

    Returns:
        The loss, or (loss, statistics).

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, device or value.
        IndexError: a target outside [0, K) that is not ``ignore_index``. Triton kernels, which would have to wait for the
            device to know, give such a probe a NaN loss instead.
    """
    check_embedding("embedding", embedding)
    n, d = embedding.shape
    device = embedding.device
    check_tensor("prototypes", prototypes, (None, d), QUEUE_DTYPES, device)
    if prototypes.requires_grad and prototypes.dtype == torch.float8_e4m3fn:
        raise TypeError("prototypes in float8_e4m3fn are frozen, got requires_grad=True")
    k = prototypes.shape[0]
    if k == 0:
        raise ValueError("prototypes must have at least one row, got [0, D]")
    check_tensor("target", target, (n,), (torch.int64,), device)
    if identity is not None:
        check_tensor("identity", identity, (n,), (torch.int64,), device)
        if slot_identity is None:
            raise ValueError("identity masks slots of the same identity and needs slot_identity as well, got None")
    if slot_identity is not None:
        check_tensor("slot_identity", slot_identity, (k,), (torch.int64,), device)
    if not isinstance(margin, Margin):
        raise TypeError(f"margin must be a margin of sst_fast.margins, got {type(margin).__name__}")
    _check_scale(scale, n, device)
    if weight is not None:
        check_tensor("weight", weight, (n,), EMBEDDING_DTYPES, device)
    if not (isinstance(label_smoothing, (int, float)) and 0 <= label_smoothing < 1):
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing!r}")
    for name, word, allowed in (
        ("reduction", reduction, ("none", "mean", "sum")),
        ("gradient", gradient, ("exact", "straight_through")),
    ):
        if word not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {word!r}")
    if reduction == "mean" and n == 0:
        raise ValueError("embedding must have at least one row for reduction='mean', got [0, D]")

    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        embedding = embedding.to(dtype) if embedding.dtype == torch.float32 else embedding
        prototypes = prototypes.to(dtype) if prototypes.dtype == torch.float32 else prototypes
    features = window_identity = start = None
    if window is not None:
        features, window_identity, start = window.features, window.identities, window.start
        check_tensor("window.features", features, (None, None, d), QUEUE_DTYPES, device)
        h, b = features.shape[:2]
        check_tensor("window.identities", window_identity, (b,), (torch.int64,), device)
        if h == 0 or n % h:
            raise ValueError(f"embedding: {n} rows cannot be split evenly over the window's {h} groups")
        if b > k:
            raise ValueError(f"window holds {b} slots, more than the {k} rows of prototypes")
        features = features.to(prototypes.dtype)

    valid = target != ignore_index
    embedding = embedding.masked_fill(~valid[:, None], 0)  # an ignored row may hold anything
    # Norms are wanted by margins that depend on them only; nothing is computed for the others.
    norm = embedding_norm(embedding) if margin.uses_norm else None
    penalty = None if norm is None else margin.penalty(norm)
    scale = margin.scale_for(scale, k)
    if norm is not None:
        margin = margin.for_batch(norm)
    for value in margin.parameters():
        if isinstance(value, Tensor) and (value.shape not in ((), (n,)) or value.device != device):
            raise ValueError(
                f"margin: a parameter must be a number or a tensor [{n}] or [] on {device}, "
                f"got {list(value.shape)} on {value.device}"
            )

    rest = (target.where(valid, 0), identity, slot_identity, features, window_identity, start)
    chosen = choose("margin_softmax", device, backend)
    wide = reference.wide_dtype(embedding, prototypes)
    grad = torch.is_grad_enabled()
    trains_prototypes = grad and prototypes.requires_grad
    for name, instead in (("cuda_float8", "cuda"), ("cuda", "triton")):
        if chosen == name:
            fits = implementation(name, "fits")
            if wide == torch.float64 or not fits(prototypes, trains_prototypes, normalize_prototypes, label_smoothing):
                chosen = instead
    if chosen == "triton":
        # More exact than the kernels are, or beyond what they hold in registers.
        fits = implementation("triton", "fits")
        if wide == torch.float64 or not fits(prototypes, trains_prototypes):
            chosen = "reference"
    straight = gradient == "straight_through"
    # Rows that a window replaces are another tensor's: autograd sorts that out.
    if chosen == "reference" or (window is not None and trains_prototypes):
        margin = margin.map(lambda parameter: parameter.to(wide))
        scale = scale.to(wide) if isinstance(scale, Tensor) else scale
        if normalize_prototypes:
            prototypes = reference.normalize(prototypes.to(wide))
            if features is not None:
                rest = (*rest[:3], reference.normalize(features.to(wide).flatten(0, 1)).view_as(features), *rest[4:])
        with torch.autocast(device.type, enabled=False):
            plain = reference.margin_softmax(
                embedding, prototypes, *rest, margin, scale, mask_empty, float(label_smoothing), straight
            )
        loss, statistics = plain.loss, Statistics(*plain[1:])
    else:
        parameters, margin_rows = _per_row(margin.parameters(), n)
        loss, _, *columns = ops.margin_softmax(
            embedding, prototypes, *rest, margin_rows, scale.double().expand(n) if isinstance(scale, Tensor) else None,
            margin.kind, parameters, 0.0 if isinstance(scale, Tensor) else float(scale), mask_empty, normalize_prototypes,
            float(label_smoothing), straight, grad and embedding.requires_grad, chosen,
        )  # fmt: skip
        statistics = Statistics(*columns[:5])
    if penalty is not None:
        loss = loss + penalty.to(loss.dtype)
    loss = torch.where(valid, loss if weight is None else loss * weight, 0)
    if reduction == "mean":
        total = valid.sum() if weight is None else torch.where(valid, weight, 0).sum()
        loss = loss.sum() / torch.where(total == 0, 1, total)
    elif reduction == "sum":
        loss = loss.sum()
    return (loss, statistics) if return_statistics else loss


def target_cosine(
    embedding: Tensor,
    prototypes: Tensor,
    target: Tensor,
    window: Window | None = None,
    normalize_prototypes: bool = False,
) -> Tensor:
    """Cosine of each probe with its target prototype, [N], without gradient: N x D operations.

    Args as in :func:`margin_softmax`, which checks them.
    """
    with torch.no_grad():
        rows = prototypes[target]
        if window is not None:
            groups, b, _ = window.features.shape
            inside = (target - window.start) % len(prototypes)
            group = torch.arange(len(target), device=target.device) // max(len(target) // groups, 1)
            own = window.features[group, inside.clamp_max(b - 1)].to(rows.dtype)
            rows = torch.where((inside < b)[:, None], own, rows)
        wide = reference.wide_dtype(embedding, prototypes)
        rows = reference.normalize(rows.to(wide)) if normalize_prototypes else rows.to(wide)
        cosine: Tensor = (reference.normalize(embedding.to(wide)) * rows).sum(1)
        return cosine


def embedding_norm(embedding: Tensor) -> Tensor:
    """Norms [N] of embeddings [N, D], at least float32."""
    wide = torch.promote_types(embedding.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(embedding.to(wide), dim=1)
    return norm


def _per_row(parameters: list[Parameter], n: int) -> tuple[list[float], Tensor | None]:
    """The numbers, and where one of them is a tensor all of them as float64 [P, N]."""
    tensors = [p for p in parameters if isinstance(p, Tensor)]
    if not tensors:
        return [float(p) for p in parameters], None
    blank = torch.zeros(n, dtype=torch.float64, device=tensors[0].device)
    rows = torch.stack([(p.double().expand(n) if isinstance(p, Tensor) else blank + float(p)) for p in parameters])
    return [0.0 if isinstance(p, Tensor) else float(p) for p in parameters], rows


def _check_scale(scale: Parameter, n: int, device: torch.device) -> None:
    if isinstance(scale, Tensor):
        if not scale.is_floating_point() or scale.shape not in ((), (n,)) or scale.device != device:
            raise ValueError(
                f"scale must be a number or a floating-point tensor [{n}] or [] on {device}, "
                f"got {scale.dtype} {list(scale.shape)} on {scale.device}"
            )
        if scale.requires_grad:
            raise ValueError("scale must not require a gradient: it is a constant")
    elif not (isinstance(scale, (int, float)) and math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be a finite number > 0, got {scale!r}")


def check_embedding(name: str, value: Tensor) -> None:
    """TypeError or ValueError unless ``value`` is a floating-point [N, D] with D > 0."""
    check_tensor(name, value, (None, None), EMBEDDING_DTYPES, None)
    if value.shape[1] == 0:
        raise ValueError(f"{name} must have D > 0 features, got shape {list(value.shape)}")


def check_tensor(
    name: str,
    value: Tensor,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device | None,
) -> None:
    """TypeError or ValueError that names the argument, what was expected and what came."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {expected}, got {str(value.dtype).removeprefix('torch.')}")
    fits = value.dim() == len(shape) and all(e is None or e == s for e, s in zip(shape, value.shape, strict=True))
    if not fits:
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{expected}], got {list(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device} like the other tensors, got {value.device}")
