"""Every backend against the float64 reference, on whatever hypothesis thinks of: ``make fuzz`` draws 2,000 examples of each.

Rows go to extremes (of any length, zero, not finite, parallel or opposite to their target, coinciding), tensors come in every
layout, options in any combination. What is right to within rounding follows from the numbers: a cosine is off by ``rounding``
at most, a logit by scale times that, a loss by as much, and a row's gradient, of length at most 2 (1 - p) scale / norm, by that
share of it. Where a rule jumps (a slot is hard or is not) within the rounding, both answers are right, and such rows are left out.
"""

import os
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import event, given, settings
from hypothesis import strategies as st
from problems import MARGINS

from sst_fast import GalleryQueue, Window
from sst_fast.backends.choose import backends
from sst_fast.backends.extension import compiled
from sst_fast.functional import Statistics, margin_softmax
from sst_fast.margins import (
    AdaCos,
    AdaFace,
    AMSoftmax,
    ArcNegFace,
    ArcSoftmax,
    CombinedMargin,
    FilteredMargin,
    MagFace,
    Margin,
    MVSoftmax,
    NPCFace,
)
from sst_fast.reference import window_slots

LOSS = [name for name, state in backends("cpu")["margin_softmax"].implementations.items() if state == "available"]
QUEUE = [name for name, state in backends("cpu")["enqueue"].implementations.items() if state == "available"]
INTERPRETED = [name for name in ("triton", "staged") if name in LOSS]
if INTERPRETED:
    import interpreter  # noqa: F401

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
QUEUE_FLOATS = [*FLOATS, torch.float8_e4m3fn]
# Of a profile as many as it says (tests/conftest.py), and 200 where none was chosen.
EXAMPLES = settings.default.max_examples
USUAL = settings(max_examples=200 if EXAMPLES == 100 else EXAMPLES, deadline=None)
MIN_NORM = 1e-12
FEW_MARGINS = [
    *MARGINS, MagFace(), MagFace(0.1, 3.0, easy=False, weight=0.5), AdaFace(mean=1.0, std=1.0), AdaFace(clamps=True), AdaCos(), AdaCos(12.0),
    ArcSoftmax(3.0, beyond="cosine"), ArcSoftmax(1.0, beyond=0.3), CombinedMargin(1.35, -0.5, 0.0, beyond="hold"),
    CombinedMargin(0.9, 0.4, 0.1, 0.5, beyond="cosine"), FilteredMargin(1.0, 0.5, 0.0, "clamp", threshold=0.9, above=0.9),
    MVSoftmax(0.4, 1.3, arc=True, positive_only=True), MVSoftmax(0.3, 4.0, positive_only=True), NPCFace(positive_only=True),
    ArcNegFace(0.3, 2.0, 0.1),
]  # fmt: skip


def of_rows(n: int) -> list[Margin]:
    """Margins with one value for each probe."""
    share = torch.linspace(0, 1, n)
    return [AMSoftmax(share), ArcSoftmax(2 * share), MVSoftmax(share.half(), torch.tensor(1.3)),
            CombinedMargin(1 + share, share.double(), torch.tensor(0.1)), NPCFace(share, alpha=share)]  # fmt: skip


@dataclass
class Case:
    """Arguments of the loss, and the gradient that comes in from above."""

    embedding: torch.Tensor
    prototypes: torch.Tensor
    target: torch.Tensor | None
    incoming: torch.Tensor
    options: dict
    trains: bool  # the prototypes
    positive: torch.Tensor | None = None
    window: Window | None = None
    layout: dict[str, str] = field(default_factory=dict)

    def run(self, backend: str):
        """Loss, statistics, gradients by name."""
        leaves = {"embedding": self.embedding.detach().requires_grad_()}
        leaves["prototypes"] = self.prototypes.detach()
        if self.trains:
            leaves["prototypes"].requires_grad_()
        if self.positive is not None:
            leaves["positive"] = self.positive.detach().requires_grad_()
        loss, statistics = margin_softmax(
            target=self.target, window=self.window, backend=backend, return_statistics=True, **leaves, **self.options
        )
        wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        found = torch.autograd.grad((loss * self.incoming).sum(), list(wanted.values()))
        return loss.detach(), statistics, dict(zip(wanted, found, strict=True))

    def exact(self) -> "Case":
        """The same numbers in float64."""
        window = self.window and self.window._replace(
            features=self.window.features.to(self.prototypes.dtype).double()
        )  # held as the queue will hold them
        scale, weight = self.options["scale"], self.options["weight"]
        return replace(
            self, embedding=self.embedding.double(), prototypes=self.prototypes.double(), window=window,
            positive=self.positive if self.positive is None else self.positive.double(),
            options=self.options | {
                "margin": self.options["margin"].map(torch.Tensor.double),
                "scale": scale.double() if isinstance(scale, torch.Tensor) else scale,
                "weight": weight if weight is None else weight.double(),
            },
        )  # fmt: skip


def unit_rows(x: torch.Tensor) -> torch.Tensor:
    largest = x.abs().amax(-1, keepdim=True)
    x = x / largest.where(largest > 0, 1)
    norm = x.norm(dim=-1, keepdim=True)
    return torch.where(norm * largest < MIN_NORM, 0, x / norm.where(norm > 0, 1))


def arranged(t: torch.Tensor, how: str) -> torch.Tensor:
    """The same values in another layout."""
    if how == "strided":
        wide = t.new_zeros(*t.shape, 2) if t.dtype != torch.float8_e4m3fn else torch.zeros(*t.shape, 2).to(t.dtype)
        wide[..., 0] = t
        return wide[..., 0]
    if how == "shifted":
        return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) if t.numel() else t
    if how == "transposed" and t.dim() > 1:
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    return t


# What a row is, beside its length.
PROBES = ["near", "random", "target", "opposite", "almost", "zero", "axis", "nan", "inf"]
LENGTHS = [1.0, 30.0, 1e-6, 1e-30, 1e3, 1e30]


def loss_case(data, windowed: bool, small: bool, wide: bool = True) -> Case:
    """Anything that the loss takes; ``wide``: float64 too."""
    draw = data.draw
    groups = draw(st.integers(1, 3), "groups") if windowed else 1
    k = draw(st.integers(1, 40 if small else 260), "k")
    n = groups * draw(
        st.integers(0, min(k, 10 if small else 70)) if windowed else st.integers(0, 24 if small else 140), "rows"
    )
    d = draw(st.sampled_from([1, 2, 3, 8, 17, 33] if small else [1, 2, 3, 7, 16, 40, 100, 129, 200]), "d")
    sub_centers = 1 if windowed else draw(st.sampled_from([1, 1, 2, 3, 5]), "sub_centers")
    rows = k * sub_centers
    dtype, queue_dtype = (
        draw(st.sampled_from(some if wide else some[1:]), name)
        for name, some in (("dtype", FLOATS), ("queue dtype", QUEUE_FLOATS))
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20), "seed"))
    rand = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    pick = lambda count, some: torch.tensor([some[i] for i in torch.randint(len(some), (count,), generator=generator)])
    largest = min(torch.finfo(dtype).max / 4, 1e30)

    normalize = draw(st.booleans(), "normalize_prototypes")
    w = unit_rows(rand(rows, d) + draw(st.sampled_from([0.0, 0.0, 3.0]), "cone"))
    window = start = None
    if windowed:
        start = draw(st.integers(0, k - 1), "start")
        window = unit_rows(rand(groups, n // groups, d))
    if draw(st.booleans(), "rows coincide"):
        w = w[torch.randint(max(rows // 3, 1), (rows,), generator=generator)]
    if normalize and queue_dtype != torch.float8_e4m3fn:  # float8 holds nothing below 2e-3
        ends = [1.0, 3.0, 0.01] + ([1e-20, 1e20, 0.0] if queue_dtype not in (torch.float16,) else [1e-3, 100.0, 0.0])
        w = w * pick(rows, draw(st.sampled_from([ends[:1], ends[:3], ends]), "lengths of prototypes"))[:, None]
    w = w.to(queue_dtype)

    few = draw(st.sampled_from([1, 2, 5, 1000]), "identities")
    slot_identity = torch.randint(few, (k,), generator=generator)
    slot_identity[torch.rand(k, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]), "empty")] = -1
    if windowed:
        ids = torch.randint(few, (n // groups,), generator=generator)
        slots = window_slots(torch.tensor(start), n // groups, k)
        target, identity = slots.repeat(groups), ids.repeat(groups)
        if draw(st.booleans(), "other targets"):
            target = torch.randint(k, (n,), generator=generator)
        window = Window(
            window.to(draw(st.sampled_from([queue_dtype, queue_dtype, torch.float32]), "window dtype")),
            ids,
            torch.tensor(start),
            slots,
        )
    else:
        target = torch.randint(k, (n,), generator=generator)
        identity = slot_identity[target].clamp_min(0)

    # Probes around their targets.
    seen = torch.stack([w.double().index_copy(0, slots, window.features[g].to(queue_dtype).double()) for g in range(groups)]) \
        if windowed else w.double()[None]  # fmt: skip
    some_row = target * sub_centers + torch.randint(sub_centers, (n,), generator=generator)
    own = unit_rows(seen[torch.arange(n) // max(n // groups, 1), some_row]) if n else rand(0, d)
    positive = None
    if draw(st.sampled_from([False, False, True]), "positive"):
        positive = unit_rows(rand(n, d))
        own = positive
        if normalize:
            positive = (
                positive
                * pick(n, draw(st.sampled_from([[1.0], [0.1, 30.0], [1e-6, 1e3, 0.0]]), "lengths of positives"))[
                    :, None
                ]
            )
        positive = positive.to(draw(st.sampled_from([torch.float32, dtype]), "positive dtype"))
        target = draw(
            st.sampled_from([target, None, torch.full_like(target, -1), target.where(target % 2 == 0, -1)]), "left out"
        )
    kinds = draw(st.lists(st.sampled_from(PROBES), min_size=1, max_size=4), "probes")
    noise, row = rand(n, d) / d**0.5, torch.arange(n)
    of_kind = {
        "near": own + 0.5 * noise, "random": noise, "target": own, "opposite": -own,
        "almost": own + 10.0 ** (-1 - 5 * torch.rand(n, 1, generator=generator).double()) * noise, "zero": 0 * noise,
        "axis": F.one_hot(row % d, d).double(), "nan": noise.index_put((row, row % d), torch.tensor(torch.nan).double()),
        "inf": noise.index_put((row, row % d), torch.tensor(-torch.inf).double()),
    }  # fmt: skip
    x = torch.stack([of_kind[kind] for kind in kinds])[torch.randint(len(kinds), (n,), generator=generator), row]
    lengths = draw(st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=3), "lengths of probes")
    x = (x * pick(n, [min(length, largest) for length in lengths])[:, None]).to(dtype)

    ignore = draw(st.sampled_from([-100, 0, k // 2, 2**62]), "ignore_index")
    if target is not None and n and draw(st.booleans(), "ignored rows"):
        target = target.clone()
        target[torch.rand(n, generator=generator) < 0.3] = ignore
    masks = draw(st.sampled_from(["both", "both", "slots", "none"]), "masks")
    mask_empty = draw(st.booleans(), "mask_empty")
    if masks != "none" and mask_empty and queue_dtype != torch.float8_e4m3fn and target is None:
        w = w.masked_fill(
            (slot_identity < 0).repeat_interleave(sub_centers)[:, None], torch.nan
        )  # whatever an empty slot holds is masked
    reduction = draw(st.sampled_from(["none", "mean", "sum"] if n else ["none", "sum"]), "reduction")
    scale = draw(st.sampled_from([30.0, 1.0, 64.0, 1e-3, 1000.0, "a tensor", "rows"]), "scale")
    scale = {"a tensor": torch.tensor(16.0), "rows": torch.linspace(1, 64, n)}.get(scale, scale)
    weight = draw(st.sampled_from([None, None, torch.float32, torch.float16, torch.float64]), "weight")
    margins = {repr(margin): margin for margin in (*FEW_MARGINS, *of_rows(n))}
    options = {
        "margin": margins[draw(st.sampled_from(list(margins)), "margin")], "scale": scale, "reduction": reduction,
        "weight": weight if weight is None else pick(n, [0.0, 0.5, 1.0, 90.0]).to(weight), "ignore_index": ignore,
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1, 0.9]), "label_smoothing"),
        "identity": identity if masks == "both" else None, "slot_identity": None if masks == "none" else slot_identity,
        "mask_empty": mask_empty, "normalize_prototypes": normalize, "sub_centers": sub_centers,
        "gradient": draw(st.sampled_from(["exact", "exact", "straight_through"]), "gradient"),
    }  # fmt: skip
    how = lambda name: draw(
        st.sampled_from(["plain", "plain", "strided", "shifted", "transposed"]), f"layout of {name}"
    )
    options |= {
        name: arranged(options[name], how(name))
        for name in ("weight", "identity", "slot_identity")
        if options[name] is not None
    }
    incoming = rand(n) if reduction == "none" else rand()
    return Case(
        arranged(x, how("embedding")), arranged(w, how("prototypes")), target if target is None else arranged(target, how("target")),
        incoming, options, draw(st.booleans(), "prototypes are trained") and queue_dtype != torch.float8_e4m3fn,
        positive if positive is None else arranged(positive, how("positive")),
        window and window._replace(features=arranged(window.features, how("window")), identities=arranged(window.identities, how("window identities"))),
    )  # fmt: skip


@dataclass
class Truth:
    """What a float64 answer is judged by, of each probe [N] and each slot [N, K]: the nearest of its rows."""

    cosine: torch.Tensor  # [N, K]
    ahead: torch.Tensor  # [N, K]: of the slot's second nearest row
    live: torch.Tensor  # bool [N, K]: negatives
    own: torch.Tensor  # cosine with the target
    sine: torch.Tensor
    norm: torch.Tensor
    prototype_norm: torch.Tensor  # of each row
    counts: torch.Tensor  # bool [N]: finite and not ignored
    ignored: torch.Tensor
    weight: torch.Tensor  # what a row's loss is multiplied by in the end

    @staticmethod
    def of(case: Case) -> "Truth":
        x, w, n, options = case.embedding.double(), case.prototypes.double(), len(case.embedding), case.options
        sub_centers = options["sub_centers"]
        k = len(w) // sub_centers
        target = torch.full((n,), -1) if case.target is None else case.target
        ignored = torch.zeros(n, dtype=torch.bool) if case.target is None else target == options["ignore_index"]
        target = target.where(~ignored, -1)
        counts = x.isfinite().all(1) & ~ignored
        normalised = unit_rows if options["normalize_prototypes"] else lambda t: t
        groups = 1 if case.window is None else len(case.window.features)
        group = torch.arange(n) // max(n // groups, 1)
        seen, ids = w[None].expand(groups, -1, -1).clone(), options["slot_identity"]
        if case.window is not None:
            slots = case.window.slots
            seen[:, slots] = case.window.features.to(case.prototypes.dtype).double()
            ids = None if ids is None else ids.index_copy(0, slots, case.window.identities)
        seen = normalised(seen.flatten(0, 1)).view_as(seen).nan_to_num()
        unit = unit_rows(x.where(counts[:, None], 0))
        cosine = (
            torch.stack([unit[i] @ seen[g].T for i, g in enumerate(group.tolist())])
            if n
            else torch.zeros(0, len(w)).double()
        )
        of_rows = cosine.view(n, k, sub_centers)
        cosine, ahead = of_rows.amax(2), torch.full((n, k), torch.inf).double()
        if sub_centers > 1:
            two = of_rows.topk(2).values
            ahead = two[:, :, 0] - two[:, :, 1]
        slot = target.clamp_min(0)
        nearest = slot * sub_centers + of_rows[torch.arange(n), slot].argmax(1)
        own = normalised(case.positive.double()) if case.positive is not None else seen[group, nearest]
        a = (unit * own).sum(1)
        live = torch.ones(n, k, dtype=torch.bool)
        if ids is not None and options["identity"] is not None:
            live &= options["identity"][:, None] != ids
        if ids is not None and options["mask_empty"]:
            live &= ids >= 0
        live &= target[:, None] != torch.arange(k)
        weight = torch.ones(n).double() if options["weight"] is None else options["weight"].double()
        weight = weight * ~ignored
        if options["reduction"] == "mean":
            weight = weight / (weight.sum() if weight.any() else 1)
        return Truth(
            cosine,
            ahead,
            live,
            a,
            (own - a[:, None] * unit).norm(dim=1),
            x.norm(dim=1),
            w.norm(dim=1),
            counts,
            ignored,
            weight,
        )

    def at_ties(self, margin: Margin, scale: torch.Tensor, lse: torch.Tensor, even: float, h: float) -> torch.Tensor:
        """[N]: the weights of slots of which rounding by ``h`` decides what row is nearest; ``even``: label smoothing."""
        z = scale[:, None] * margin.phi(self.cosine, self.own[:, None], self.sine[:, None])
        weights = (z - lse[:, None]).exp().clamp_max(1) + even / (1 + self.live.sum(1, keepdim=True))
        return torch.where(self.live & (self.ahead <= 2 * h), weights, 0).sum(1).nan_to_num()

    def undecided(self, target: torch.Tensor | None) -> torch.Tensor:
        """bool [N]: two of the target's rows are equally near, to within the rounding of float64."""
        if target is None:
            return torch.zeros_like(self.counts)
        slot = target.clamp(0, self.ahead.shape[1] - 1)
        return self.ahead.gather(1, slot[:, None])[:, 0] < 1e-9

    def uncertain(self, margin: Margin, h: float) -> torch.Tensor:
        """bool [N]: rounding of cosines by ``h`` decides between the pieces of psi or phi."""
        a, c, sine = self.own, self.cosine, self.sine

        def jumps(f, x, slack):
            at = [f(x + s * h) for s in (-2, -1, 1, 2)]
            value = (at[2] - at[1]).abs() > slack * h
            return value | (((at[3] - at[2]) - (at[1] - at[0])).abs() > 0.1 * h)

        slack = 4 * (4 + largest_factor(margin) ** 2)
        found = jumps(lambda a: margin.psi(a, sine=sine) + 0 * a, a, slack)
        across = sine[:, None]
        low, high = (a - h)[:, None], (a + h)[:, None]
        hard = margin.is_hard if margin.uses_hard_mean else lambda c, a, sine: torch.zeros_like(c, dtype=torch.bool)
        some = ((margin.phi(c, high, across) - margin.phi(c, low, across)).abs() > 60 * h) | (
            hard(c, high, across) != hard(c, low, across)  # a limit that follows the target
        )
        for near in (low, high):
            some |= jumps(lambda c, near=near: margin.phi(c, near, across) + 0 * c, c, 60)
            some |= hard(c + h, near, across) != hard(c - h, near, across)
        found |= (some & self.live).any(1)
        # The direction across a parallel row is rounding.
        return found | ((sine > 1e-13) & (sine < 1e-9))


def largest_factor(margin: Margin) -> float:
    """Of the angle."""
    factor = torch.as_tensor(getattr(margin, "m1", 1.0))
    return float(factor.max()) if factor.numel() else 1.0


def rounding(case: Case, backend: str) -> tuple[float, float]:
    """Of cosines and of the weights that slots get."""
    dtypes = (case.embedding.dtype, case.prototypes.dtype)
    wide = torch.float64 in dtypes
    cosine = 16 * (2.0**-53 if wide else 2.0**-24)
    if backend in INTERPRETED and not wide and dtypes[1] != torch.float32:
        # Multiplied as the queue's dtype; float8 as float16 by the fused sweep, as bfloat16 by the staged one.
        narrow = dtypes[1] == torch.bfloat16 or (backend == "staged" and dtypes[1] == torch.float8_e4m3fn)
        return (2.0**-7, 2.0**-7) if narrow else (2.0**-10, 2.0**-10)
    if backend == "cpu" and dtypes[0] == torch.bfloat16 and dtypes[1] in (torch.bfloat16, torch.float8_e4m3fn):
        return cosine, 2.0**-8  # where the processor multiplies pairs of bfloat16
    return cosine, cosine


def compare(found, expected, tolerance, dtype, what):
    """Rows of a gradient: to within ``tolerance`` [rows] and one rounding to ``dtype``; infinite where ``dtype`` may have no number."""
    number = torch.finfo(dtype)
    assert found.dtype == dtype
    allowed = (
        tolerance + number.eps * expected.norm(dim=1) + number.smallest_normal * number.eps * expected.shape[1] ** 0.5
    )
    may_overflow = expected.abs() + allowed[:, None] > 0.9 * number.max
    difference = (found.double() - expected).masked_fill(found.isinf() & may_overflow, 0)
    error = difference.norm(dim=1)
    worst = int((error / allowed).nan_to_num(torch.inf).argmax()) if len(error) else 0
    assert (error <= allowed).all(), (
        f"{what}[{worst}]: off by {error[worst]:.3g} of {expected[worst].norm():.3g}, allowed {allowed[worst]:.3g}"
    )


def check(case: Case, backend: str) -> None:
    loss, seen, found = case.run(backend)
    expected, known, exact = case.exact().run("reference")
    options, truth = case.options, Truth.of(case)
    n = len(case.embedding)
    wide = torch.float64 if torch.float64 in (case.embedding.dtype, case.prototypes.dtype) else torch.float32
    assert loss.dtype == wide
    assert all(value.shape == (n,) for value in seen)
    margin, scale = options["margin"], options["scale"]
    margin = margin.map(torch.Tensor.double)
    norm = truth.norm.where(truth.counts, 0)
    scale = torch.as_tensor(margin.scale_for(scale, truth.cosine.shape[1], norm)).double().expand(n)
    penalty = margin.penalty(norm) if margin.uses_norm else None
    margin = margin.for_batch(norm)
    of_cosines, of_weights = rounding(case, backend)
    good = truth.counts & ~truth.uncertain(margin, 2 * of_cosines)
    if case.positive is None:
        good &= ~truth.undecided(case.target)
    poisoned = ~truth.ignored & ~truth.counts
    event(f"{int(good.sum()) * 4 // max(n, 1)} quarters of the rows are compared")

    # How far rounding takes logits, losses and gradients.
    steepness = 4 + largest_factor(margin) ** 2
    step = torch.expm1((2 * scale * steepness * of_cosines).clamp_max(60))
    bare = {"margin": margin, "scale": scale, "label_smoothing": 0.0, "reduction": "none", "weight": None}
    share = -torch.expm1(-replace(case.exact(), options=options | bare, incoming=torch.ones(n)).run("reference")[0])
    share = share + options["label_smoothing"] + 1e-36  # kernels hold exponentials there
    of_loss = share * step + 16 * torch.finfo(wide).eps * (1 + (0 if penalty is None else penalty))
    of_loss = torch.where(good, of_loss, torch.inf) * truth.weight
    incoming = (case.incoming.expand(n) * truth.weight).abs()
    across = 2.0**-48 / truth.sine.clamp_min(MIN_NORM)  # the direction in which the target lies
    of_row = incoming * scale * share * steepness * (step + of_weights + 16 * torch.finfo(wide).eps + across)
    # Of two rows that are equally near, either is right; unit rows are 2 apart at most.
    at_ties = truth.at_ties(margin, scale, known.lse.double(), options["label_smoothing"], 2 * of_cosines)
    of_row = of_row + 2 * incoming * scale * steepness * at_ties

    # Losses.
    if options["reduction"] == "none":
        assert (loss[truth.ignored] == 0).all()
        assert loss[poisoned & (truth.weight != 0)].isnan().all()
        error = (loss.double() - expected).abs()
        allowed = of_loss + 16 * torch.finfo(wide).eps * expected.abs()
        assert (error <= allowed)[good].all(), (
            f"loss: off by {error[good].max():.3g}, allowed {allowed[good].min():.3g}"
        )
    elif poisoned[truth.weight != 0].any():
        assert loss.isnan()
    elif good[truth.weight != 0].all():
        allowed = of_loss[truth.weight != 0].sum() + 16 * torch.finfo(wide).eps * expected.abs()
        assert (loss.double() - expected).abs() <= allowed, f"loss: {loss}, expected {expected}, allowed {allowed:.3g}"

    # Gradients.
    inverse = torch.where(truth.norm < MIN_NORM, 0, 1 / truth.norm)
    radial = 0 if penalty is None else incoming * 16 * torch.finfo(torch.float32).eps * 100
    assert (found["embedding"][truth.ignored] == 0).all()
    assert found["embedding"][poisoned & (truth.weight != 0)].isnan().any(1).all()
    assert found["embedding"][poisoned & (truth.weight == 0)].isfinite().all()
    compare(
        found["embedding"][good],
        exact["embedding"][good],
        (of_row * inverse + radial)[good],
        case.embedding.dtype,
        "embedding.grad",
    )
    slope = 1 / truth.sine.clamp(MIN_NORM, 1)
    sure = good | truth.ignored | (truth.counts & (truth.weight == 0))
    if case.trains and sure.all():
        norms = truth.prototype_norm if options["normalize_prototypes"] else torch.ones_like(truth.prototype_norm)
        inverse = torch.where(norms < MIN_NORM, 0, 1 / norms)
        usable = case.prototypes.isfinite().all(1)
        allowed = ((of_row * slope).sum() * inverse)[usable]
        compare(
            found["prototypes"][usable], exact["prototypes"][usable], allowed, case.prototypes.dtype, "prototypes.grad"
        )
    if case.positive is not None:
        norms = case.positive.double().norm(dim=1) if options["normalize_prototypes"] else torch.ones(n).double()
        inverse = torch.where(norms < MIN_NORM, 0, 1 / norms)
        compare(
            found["positive"][good],
            exact["positive"][good],
            (of_row * slope * inverse)[good],
            case.positive.dtype,
            "positive.grad",
        )
        assert (found["positive"][truth.ignored] == 0).all()

    check_statistics(seen, known, truth, good, of_cosines, scale * steepness * of_cosines + 16 * torch.finfo(wide).eps)


def check_statistics(seen: Statistics, known: Statistics, truth: Truth, good, of_cosines, of_logits) -> None:
    close = lambda a, b, tolerance: ((a.double() - b).abs() <= tolerance)[good].all()
    assert close(seen.target_cosine, truth.own, of_cosines)
    masked = truth.cosine.masked_fill(~truth.live, -torch.inf)
    alone = ~truth.live.any(1)
    assert torch.equal((seen.hardest_slot < 0)[good], alone[good])
    assert (seen.hardest_cosine == -torch.inf)[good & alone].all()
    rest = good & ~alone
    if rest.any():
        slot = seen.hardest_slot[rest]
        hardest = masked[rest].amax(1)
        assert ((seen.hardest_cosine[rest].double() - hardest).abs() <= 2 * of_cosines).all()
        assert (masked[rest].gather(1, slot[:, None])[:, 0] >= hardest - 2 * of_cosines).all()
    near = truth.own[:, None]
    least, most = ((masked > near + sign * 2 * of_cosines).sum(1) for sign in (1, -1))
    assert ((least <= seen.beats_target) & (seen.beats_target <= most))[good].all()
    lse = known.lse.double()
    assert close(
        seen.lse,
        lse,
        of_logits + 2e-6 * lse.abs() if seen.lse.dtype == torch.float32 else of_logits + 1e-13 * lse.abs(),
    )


@contextmanager
def drawn_threads(data):
    """One or several threads, whatever the processor has: how rows and slots are shared out depends on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(data.draw(st.sampled_from([1, 2, 3]), "threads"))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", [name for name in LOSS if name not in INTERPRETED])
@USUAL
@given(data=st.data())
def test_loss(backend, data):
    asked = os.environ.get("SST_FAST_CPU")
    if backend == "cpu" and asked not in (None, "", compiled.instruction_set()):
        pytest.skip(f"no {asked} here")
    with drawn_threads(data):
        check(loss_case(data, data.draw(st.booleans(), "window"), small=False), backend)


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter and the extension")
@pytest.mark.parametrize("windowed", [False, True])  # two tests, so that two processes share them
@pytest.mark.parametrize("backend", INTERPRETED)
@settings(USUAL, max_examples=USUAL.max_examples // 2)
@given(data=st.data())
def test_loss_in_the_interpreter(backend, windowed, data):
    check(loss_case(data, windowed, small=True, wide=backend == "staged"), backend)


# --- the queue -------------------------------------------------------------------------------------------------------


def batch_of(data, count: int, dim: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Rows [count, dim] of any length in any layout, some of them not finite."""
    rows = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    lengths = data.draw(
        st.lists(st.sampled_from([1.0, 1e-6, 1e3, 1e-30, 1e30, 0.0]), min_size=1, max_size=3), "lengths"
    )
    for i in range(count):
        rows[i] *= min(lengths[i % len(lengths)], torch.finfo(dtype).max / 16)
    bad = data.draw(st.sampled_from([[], [], [torch.nan], [torch.inf, -torch.inf]]), "not finite")
    for i, value in enumerate(bad):
        if count > 2 * i:
            rows[2 * i, i % dim] = value
    return arranged(rows.to(dtype), data.draw(st.sampled_from(["plain", "strided", "shifted", "transposed"]), "layout"))


@pytest.mark.parametrize("backend", QUEUE)
@USUAL
@given(data=st.data())
def test_queue(backend, data):
    """Any sequence of its operations: what it holds is what a first-in first-out list of at most K would."""
    draw = data.draw
    size, dim = draw(st.integers(1, 12), "size"), draw(st.sampled_from([1, 2, 7, 16, 33]), "dim")
    dtype = draw(st.sampled_from(QUEUE_FLOATS), "dtype")
    queue = GalleryQueue(size, dim, dtype, spare=draw(st.integers(0, 3), "spare"), backend=backend)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20), "seed"))
    held: list[
        tuple[int, torch.Tensor, torch.dtype]
    ] = []  # identity, -1 where the row was refused; unit row; computed in
    rejected = number = 0
    for step in draw(
        st.lists(st.sampled_from(["enqueue", "enqueue", "unit", "window", "dequeue", "clear"]), max_size=8), "steps"
    ):
        count = draw(st.integers(0, size), "count")
        if step == "clear":
            queue.clear()
            held = []
        elif step == "dequeue":
            gone = queue.dequeue(count)
            expected = [identity for identity, *_ in held[:count]]
            assert gone.tolist() == expected + [-1] * (count - len(expected))
            held = held[count:]
        else:
            kind = draw(st.sampled_from(QUEUE_FLOATS if step == "unit" else FLOATS), "batch dtype")
            identities = torch.arange(number, number + count)
            number += count
            if step == "window":
                groups, start = (
                    [batch_of(data, count, dim, kind, generator) for _ in range(draw(st.integers(1, 3), "groups"))],
                    queue.state[0].clone(),
                )
                window = queue.window(groups, arranged(identities, "strided"))
                assert window.features.shape == (len(groups), count, dim)
                assert (window.start, window.slots.tolist()) == (start, window_slots(start, count, size).tolist())
                assert torch.equal(window.targets, window.slots.repeat(len(groups)))
                assert torch.equal(window.owners, identities.repeat(len(groups)))
                finite = torch.stack([g.isfinite().all(1) for g in groups]).all(0)
                assert torch.equal(window.identities, identities.where(finite, -1))
                group = draw(st.integers(0, len(groups) - 1), "group")
                batch, identities = groups[group], window.identities
                queue.enqueue_window(window, torch.tensor(group) if draw(st.booleans(), "on the device") else group)
            elif step == "unit":
                batch = arranged(
                    unit_rows(batch_of(data, count, dim, torch.float64, generator).nan_to_num(torch.nan)).to(kind),
                    "strided",
                )
                queue.enqueue(batch, arranged(identities, "shifted"), unit=True)
            else:
                batch = batch_of(data, count, dim, kind, generator)
                queue.enqueue(batch, arranged(identities, "strided"))
            finite = batch.double().isfinite().all(1)
            rejected += int((~finite).sum())
            unit = batch.double() if step == "unit" else unit_rows(batch.double().where(finite[:, None], 0))
            held += zip(
                identities.where(finite, -1).tolist(), unit.where(finite[:, None], 0), [kind] * count, strict=True
            )
            held = held[-size:]
        assert (len(queue), queue.rejected) == (len(held), rejected)
        slots = [(int(queue.state[0]) - len(held) + i) % size for i in range(len(held))]
        assert queue.identities[slots].tolist() == [identity for identity, *_ in held]
        assert int((queue.identities >= 0).sum()) == sum(identity >= 0 for identity, *_ in held)
        assert queue.contains(torch.arange(number)).tolist() == [
            n in {identity for identity, *_ in held} for n in range(number)
        ]
        age = queue.age()
        for back, (slot, (identity, row, kind)) in enumerate(zip(reversed(slots), reversed(held), strict=True)):
            assert age[slot] == (back if identity >= 0 else -1)
            tolerance = torch.finfo(dtype).eps + (1e-14 if kind == torch.float64 else 1e-6)
            found = queue.features[slot].double()
            assert (
                (found - row).abs()
                <= tolerance * row.abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps + 1e-30
            ).all()
