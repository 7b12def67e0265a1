"""The fused loss as a function: validate, select a backend, run it."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.weak import WeakTensorKeyDictionary

from sst_fast import reference
from sst_fast.arguments import (
    EMBEDDING_DTYPES,
    QUEUE_DTYPES,
    Arguments,
    GradientRule,
    Reduction,
    Statistics,
    Window,
    check_count,
    check_embedding,
    check_tensor,
    wide_dtype,
)
from sst_fast.backends.backend import size_class
from sst_fast.backends.choose import BACKENDS, attempt
from sst_fast.backends.extension import operator
from sst_fast.margins import AMSoftmax, Margin, Parameter, Softmax

__all__ = [
    "EMBEDDING_DTYPES", "QUEUE_DTYPES", "Statistics", "TopK", "Window", "embedding_norm", "margin_softmax", "target_cosine",
    "topk",
]  # fmt: skip

# Probes and prototypes of a block of topk: 16 MiB of cosines.
BLOCK = 1024, 4096
# Trained prototypes whose norms have been looked at.
_looked_at: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
# Kinds of problems whose prototype gradient a card has been seen to compute.
_backward_runs: set[tuple[object, ...]] = set()
_operator, _gradient_operator = operator("margin_softmax"), operator("prototype_gradient")


@overload
def margin_softmax(
    embedding: Tensor, prototypes: Tensor, target: Tensor | None, *, positive: Tensor | None = ..., margin: Margin = ...,
    scale: Parameter = ..., reduction: Reduction = ..., weight: Tensor | None = ..., ignore_index: int = ...,
    label_smoothing: float = ..., window: Window | None = ..., identity: Tensor | None = ...,
    slot_identity: Tensor | None = ..., mask_empty: bool = ..., normalize_prototypes: bool = ...,
    gradient: GradientRule = ..., return_statistics: Literal[False] = ..., backend: str | None = ...,
    product_dtype: torch.dtype | None = ..., sub_centers: int = ...,
) -> Tensor: ...  # fmt: skip
@overload
def margin_softmax(
    embedding: Tensor, prototypes: Tensor, target: Tensor | None, *, positive: Tensor | None = ..., margin: Margin = ...,
    scale: Parameter = ..., reduction: Reduction = ..., weight: Tensor | None = ..., ignore_index: int = ...,
    label_smoothing: float = ..., window: Window | None = ..., identity: Tensor | None = ...,
    slot_identity: Tensor | None = ..., mask_empty: bool = ..., normalize_prototypes: bool = ...,
    gradient: GradientRule = ..., return_statistics: Literal[True], backend: str | None = ...,
    product_dtype: torch.dtype | None = ..., sub_centers: int = ...,
) -> tuple[Tensor, Statistics]: ...  # fmt: skip


def margin_softmax(
    embedding: Tensor,
    prototypes: Tensor,
    target: Tensor | None,
    *,
    positive: Tensor | None = None,
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
    product_dtype: torch.dtype | None = None,
    sub_centers: int = 1,
) -> Tensor | tuple[Tensor, Statistics]:
    """Margin-softmax of probes over a gallery queue (Du et al., Semi-Siamese Training, ECCV 2020), in one sweep over the queue.

    With c_ij the cosine of probe i and slot j, and a_i that of probe i and its target slot y_i,

        loss_i = -s psi(a_i) + log( exp(s psi(a_i)) + sum over unmasked j != y_i of exp(s phi(c_ij)) ).

    No N x K tensor is ever made. The gradient for ``embedding`` is found in the same sweep. ``prototypes`` get one if they
    require it, by a second sweep in backward. Rows that ``window`` replaces get zeros. Compiled backends have no second
    derivative, and none in forward mode.

    Under autocast ``embedding`` and float32 ``prototypes`` are cast as for a linear layer, after normalisation where that is done
    inside. The loss stays float32. A gradient beyond the range of float16 embeddings is infinite, for a gradient scaler to see.

    Args:
        embedding: probes [N, D], float64, float32, bfloat16 or float16; normalised inside. A zero row has cosine 0
            with everything and gradient 0.
        prototypes: [K, D] (or [K S, D], see ``sub_centers``), same device, float64, float32, bfloat16, float16 or (without
            gradient) float8_e4m3fn. They are taken as they are: rows should have norm 1 (those of a queue do).
        target: int64 [N], row numbers of ``prototypes``. With ``positive`` it may be None, or name for each probe a row that
            is no negative (-1: none).
        positive: [N, D]: the targets themselves where they are no rows of ``prototypes``, as in MoCo's InfoNCE. They are taken as
            they are, or normalised with ``normalize_prototypes``. They may require a gradient.
        margin: a margin of :mod:`sst_fast.margins`. Its parameters may be tensors [N], one value per probe. Those that it
            names ``trainable`` may require a gradient.
        scale: s in (0, 1000], the inverse temperature: a number, a 0-d tensor or a tensor [N]. It may require a gradient, which is
            found in the same sweep.
        reduction: 'mean' (default), 'sum' or 'none' (float32 [N]; float64 if an input is).
        weight: [N], floating point, multiplies each probe's loss; 'mean' then divides by the sum of weights.
        ignore_index: probes with this target have loss 0 and gradient 0, and do not count in the mean (0 if none counts).
        label_smoothing: e in [0, 1): a share e of each probe's target distribution is spread evenly over its unmasked
            slots, the target among them (Szegedy et al., CVPR 2016). Its gradient takes one more sweep.
        window: the batch's own slots, from :meth:`sst_fast.GalleryQueue.window`. It replaces those rows of
            ``prototypes`` for this call, differently for each group of probes.
        identity: int64 [N]. With ``slot_identity``, slots of the probe's own identity other than its target are masked.
        slot_identity: int64 [K], -1 for an empty slot.
        mask_empty: mask slots with identity -1 (needs ``slot_identity``).
        normalize_prototypes: divide rows of ``prototypes`` by their norm inside the sweep; their gradient follows.
        gradient: 'exact', or 'straight_through': psi' = phi' = 1, as in heads that apply the margin under ``no_grad``
            (insightface's). What FilteredMargin leaves out has no gradient either way.
        return_statistics: also return :class:`Statistics`.
        backend: force an implementation, see :func:`sst_fast.backends`. If it cannot do this, ValueError gives the reason.
        product_dtype: torch.float8_e4m3fn allows probes and weights over a float8 queue to be rounded to float8 as well. That
            is faster and less exact: cosines are off by up to 0.1 / sqrt(D). None (default): no such rounding.
        sub_centers: S in [1, 16], how many rows of ``prototypes`` stand for each class (Deng et al., Sub-center ArcFace, ECCV
            2020). ``prototypes`` are then [K S, D], class c in rows c S to c S + S - 1. A probe's cosine with a class is the
            largest over these rows. The gradient goes to that row alone, the first of equally near ones. ``target``,
            ``slot_identity`` and statistics count classes. Not together with a window.

    Returns:
        The loss, or (loss, statistics).

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, device or value.
        IndexError: a target outside [0, K) that is not ``ignore_index``. Triton kernels, which would have to wait for the
            device to know, give such a probe a NaN loss instead.
    """
    a = Arguments(
        embedding, prototypes, target, positive, margin, scale, reduction, weight, ignore_index, label_smoothing, window,
        identity, slot_identity, mask_empty, normalize_prototypes, gradient, product_dtype, sub_centers,
    )  # fmt: skip
    a.check()
    loss, statistics = evaluate(a, backend)
    return (loss, statistics) if return_statistics else loss


def evaluate(a: Arguments, backend: str | None) -> tuple[Tensor, Statistics]:
    """:func:`margin_softmax` of arguments that are known to be right; ``a`` is used up."""
    if type(a.scale) is not float and not isinstance(a.scale, Tensor):
        a.scale = float(a.scale)  # an integer, or a number of NumPy's
    _look_at_prototypes(a)
    penalty = _adapt_margin(a)
    _autocast(a)
    loss, statistics = _compute(a, backend)
    return (loss if penalty is None else loss + penalty), statistics


def _look_at_prototypes(a: Arguments) -> None:
    """Warns of class weights that were forgotten to be normalised, when they are first seen."""
    w = a.prototypes
    if a.normalize_prototypes or not w.requires_grad or isinstance(a.margin, Softmax) or torch.compiler.is_compiling():
        return
    capturing = w.is_cuda and torch.cuda.is_current_stream_capturing()
    if not w.is_leaf or not torch.is_grad_enabled() or capturing or w in _looked_at:
        return
    _looked_at[w] = True
    norm = embedding_norm(w.detach())
    least, most = norm.min().item(), norm.max().item()
    if not 0.95 < least <= most < 1.05:
        warnings.warn(
            f"prototypes require a gradient and have rows of norm {least:.3g} to {most:.3g}, expected 1: margins are meant "
            "for cosines; pass normalize_prototypes=True to divide rows by their norm inside",
            stacklevel=4,
        )


def _autocast(a: Arguments) -> None:
    """Casts float32 embeddings and prototypes as autocast does for a linear layer; what is normalised inside, normalised first.

    Raw class weights may be so small that float16 keeps little of them, and their gradient, 1 / norm times as large, overflows
    there long before that of unit rows does. The same holds for embeddings; margins have seen their norms by then.
    """
    kind = a.embedding.device.type
    if not torch.is_autocast_enabled(kind):
        return
    dtype = torch.get_autocast_dtype(kind)
    if a.embedding.dtype == torch.float32:
        small_range = dtype == torch.float16
        a.embedding = (reference.normalize(a.embedding) if small_range else a.embedding).to(dtype)
    if a.prototypes.dtype == torch.float32:
        rows = reference.normalize(a.prototypes) if a.normalize_prototypes else a.prototypes
        a.prototypes = rows.to(dtype)


def _adapt_margin(a: Arguments) -> Tensor | None:
    """Gives the margin the form it has for this batch; returns what it adds to the loss, reduced."""
    n, device = a.embedding.shape[0], a.embedding.device
    penalty = norm = None
    if a.margin.uses_norm:  # nothing is computed for the other margins
        norm = embedding_norm(reference.embedding_that_counts(a).to(a.wide))
        penalty = a.margin.penalty(norm)
    a.scale = a.margin.scale_for(a.scale, a.slots, norm)
    if norm is not None:
        a.margin = a.margin.for_batch(norm)
        if penalty is not None:
            weighted = reference.row_weight(a).to(a.wide) * penalty.to(a.wide)
            penalty = weighted if a.reduction == "none" else weighted.sum()
    for value in a.margin.parameters() if a.margin.varies else ():
        if isinstance(value, Tensor) and (value.shape not in ((), (n,)) or value.device != device):
            raise ValueError(
                f"margin: a parameter must be a number or a tensor [{n}] or [] on {device}, "
                f"got {list(value.shape)} on {value.device}"
            )
    return penalty


def _compute(a: Arguments, backend: str | None) -> tuple[Tensor, Statistics]:
    """By the backend that is chosen, or asked for."""
    records = torch.is_grad_enabled()
    trains = records and a.prototypes.requires_grad
    trains_scale = records and isinstance(a.scale, Tensor) and a.scale.requires_grad
    # A graph of torch.compile keeps one decision: what that depends on must be plain values, while sizes and Python's
    # numbers may be symbols. A range and a branch fix them.
    probes = slots = 0
    dim, smooths = a.embedding.shape[1], False
    if a.label_smoothing > 0:
        smooths = True
    if torch.compiler.is_compiling():
        dim = len(range(dim))
    else:
        probes, slots = size_class(a.embedding.shape[0]), size_class(a.prototypes.shape[0])
    problem = (
        "margin_softmax", a.embedding.device, a.embedding.dtype, a.prototypes.dtype, dim,
        a.window is not None, a.positive is not None, trains, a.normalize_prototypes, smooths, a.product_dtype,
        trains_scale, a.sub_centers > 1, probes, slots,
    )  # fmt: skip
    return attempt(problem, backend, partial(_run, a, trains=trains and backend is None))


def _run(a: Arguments, backend: str, trains: bool = False) -> tuple[Tensor, Statistics]:
    """``trains``: prototypes get a gradient in backward, by kernels that another backend can replace only now."""
    if backend == "reference":
        with torch.autocast(a.embedding.device.type, enabled=False):
            return reference.margin_softmax(a)
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        _refuse_forward_mode(a)
    keeps = (
        torch.is_grad_enabled()
        and a.prototypes.requires_grad
        and a.embedding.requires_grad
        and BACKENDS[backend].keeps_weights(
            a.embedding.shape[0], a.prototypes.shape[0], a.wide if a.wide == torch.float64 else a.prototypes.dtype
        )
    )
    packed = a.packed(keeps)
    loss, lse, target_cosine, hardest_cosine, hardest_slot, beats_target, residual, row_weight, *rest = _operator(
        *packed, backend
    )
    if trains and BACKENDS[backend].launches and not torch.compiler.is_compiling():
        kind = (
            backend,
            a.prototypes.dtype,
            a.prototypes.shape[1],
            a.margin.kind,
            a.normalize_prototypes,
            a.label_smoothing > 0,
            a.sub_centers,
            a.wide,
        )
        if kind not in _backward_runs:
            with torch.no_grad():
                _, negatives, target_slope, _, kept = rest
                found = [row_weight, lse, negatives, target_slope, kept]
                _gradient_operator(torch.zeros_like(loss), found, *packed, backend)
            _backward_runs.add(kind)
    if a.margin.trains and torch.is_grad_enabled():
        loss = loss + _margin_gradient(a, residual, row_weight)
    return loss, Statistics(lse, target_cosine, hardest_cosine, hardest_slot, beats_target)


def _refuse_forward_mode(a: Arguments) -> None:
    """The operator refuses tangents of what it differentiates; those of its constants it would drop without a word."""
    for value in (a.scale, a.weight, *a.margin.parameters()):
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise NotImplementedError(
                'sst_fast.margin_softmax has no forward-mode derivative; backend="reference" has one'
            )


def _margin_gradient(a: Arguments, residual: Tensor, row_weight: Tensor) -> Tensor:
    """Zero, with the gradient of the loss in the margin's own parameters, which enter it by psi alone.

    ``residual`` [N]: derivative of each row's loss in its target logit; ``row_weight`` [N].
    """
    with torch.no_grad():
        unit, target, _ = reference.unit_probes(a)
        cosine, sine = reference.angle_to_target(unit, reference.target_rows(a, unit, target))
        counts = row_weight != 0
        factor = torch.where(counts, row_weight * residual * a.scale, 0)
    psi = a.margin.psi(cosine, sine=sine)
    each = torch.where(factor == 0, 0, factor * (psi - psi.detach())).to(residual.dtype)
    return each if a.reduction == "none" else each.sum()


def target_cosine(
    embedding: Tensor,
    prototypes: Tensor,
    target: Tensor,
    window: Window | None = None,
    normalize_prototypes: bool = False,
    ignore_index: int = -100,
    sub_centers: int = 1,
) -> Tensor:
    """Cosine of each probe with its target prototype, [N], without gradient: N x D operations. 0 where it is ignored.

    Args as in :func:`margin_softmax`, which checks them.
    """
    a = Arguments(
        embedding,
        prototypes,
        target,
        window=window,
        normalize_prototypes=normalize_prototypes,
        ignore_index=ignore_index,
        sub_centers=sub_centers,
    )
    with torch.no_grad():
        unit, within, _ = reference.unit_probes(a)
        cosine, _ = reference.angle_to_target(unit, reference.target_rows(a, unit, within))
        return cosine.to(a.wide)


def embedding_norm(embedding: Tensor) -> Tensor:
    """Norms [N] of embeddings [N, D], at least float32."""
    wide = torch.promote_types(embedding.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(embedding.to(wide), dim=1)
    return norm


class TopK(NamedTuple):
    """The most similar prototypes of each probe, most similar first: ``cosine`` and its ``row`` number (int64), [N, k]."""

    cosine: Tensor
    row: Tensor


@torch.no_grad()
def topk(
    embedding: Tensor, prototypes: Tensor, k: int = 1, *, normalize_prototypes: bool = False, sub_centers: int = 1
) -> TopK:  # fmt: skip
    """The k prototypes most similar to each probe, found block by block: no N x K tensor is made. No gradient.

    Args:
        embedding: [N, D], normalised inside.
        prototypes: [K, D], as in :func:`margin_softmax`: taken as they are, or with ``normalize_prototypes`` by their directions.
        k: how many, 1 to K.
        sub_centers: S: ``prototypes`` are [K S, D], and of the S rows of a class the most similar one counts.

    Returns:
        Cosines, float32 (float64 if an input is), and row numbers of ``prototypes`` (numbers of classes with ``sub_centers``).
        Of equal ones any may come first.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, device or value.
    """
    check_embedding("embedding", embedding)
    check_tensor("prototypes", prototypes, (None, embedding.shape[1]), QUEUE_DTYPES, embedding.device)
    classes, rest = divmod(len(prototypes), check_count("sub_centers", sub_centers, 1))
    if rest:
        raise ValueError(
            f"prototypes must have sub_centers = {sub_centers} rows for each class, got {len(prototypes)} rows"
        )
    if check_count("k", k, 1) > classes:
        raise ValueError(f"k must be at most {classes}, the number of prototypes, got {k}")
    wide = wide_dtype(embedding, prototypes)
    step = max(1, BLOCK[1] // sub_centers)  # classes
    parts = []
    for probes in embedding.split(BLOCK[0]):
        unit = reference.normalize(probes.to(wide))
        best = TopK(unit.new_empty(len(unit), 0), torch.empty(len(unit), 0, dtype=torch.int64, device=unit.device))
        for number, rows in enumerate(prototypes.split(step * sub_centers)):
            rows = reference.normalize(rows.to(wide)) if normalize_prototypes else rows.to(wide)
            each = (unit @ rows.T).unflatten(1, (-1, sub_centers)).amax(2)
            cosine, row = each.topk(min(k, each.shape[1]))
            both = TopK(torch.cat([best.cosine, cosine], 1), torch.cat([best.row, row + number * step], 1))
            kept = both.cosine.topk(min(k, both.cosine.shape[1]))
            best = TopK(kept.values, both.row.gather(1, kept.indices))
        parts.append(best)
    return TopK(*(torch.cat(found) for found in zip(*parts, strict=True)))
