"""The arguments of the fused loss, in one structure, and what is checked about them.

``csrc/arguments.h`` is its counterpart in C++. An operator's schema has no structures, so the fields travel in lists, in the
order of :data:`TENSORS`, :data:`INTEGERS` and :data:`NUMBERS`; a test compares them with the compiled ones.

Sizes: N probes, K slots of S rows (sub-centres, usually one) each, D features, B slots in the batch window, H groups of probes, P
parameters of a margin.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sst_fast.margins import MAX_SCALE, AMSoftmax, Margin, Parameter

Reduction = Literal["none", "mean", "sum"]
GradientRule = Literal["exact", "straight_through"]

EMBEDDING_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
QUEUE_DTYPES = (*EMBEDDING_DTYPES, torch.float8_e4m3fn)
REDUCTIONS: tuple[Reduction, ...] = ("none", "mean", "sum")
GRADIENT_RULES: tuple[GradientRule, ...] = ("exact", "straight_through")
MAX_SUB_CENTERS = 16  # a tile of every kernel holds a class whole; papers use 3 to 10

TENSORS = (
    "target", "weight", "identity", "slot_identity", "window", "window_identity", "window_start", "margin_rows", "scale_rows",
)  # fmt: skip
INTEGERS = (
    "kind",
    "reduction",
    "ignore_index",
    "sub_centers",
    "mask_empty",
    "normalize",
    "straight_through",
    "float8_products",
    "keep_weights",
    "need_scale_gradient",
    "need_gradient",
)
NUMBERS = ("scale", "label_smoothing")  # and after them the margin's parameters


class Window(NamedTuple):
    """The slots that a batch is about to take, and what each group of its probes sees there.

    Attributes:
        features: [H, B, D]: probes are split into H equal groups, group h sees ``features[h]`` in these slots. No gradient.
        identities: int64 [B]; -1 where a row is not finite: it is no other probe's negative then.
        start: int64, 0-d: first of the B slots; they wrap round the end of the queue.
        slots: int64 [B]: their numbers, the targets of each group's probes.
        targets, owners: int64 [H B] or None: slots and identities of the probes of all groups.
    """

    features: Tensor
    identities: Tensor
    start: Tensor
    slots: Tensor
    targets: Tensor | None = None
    owners: Tensor | None = None


class Statistics(NamedTuple):
    """What the sweep over the queue saw, for each probe, without gradient.

    Attributes:
        lse: [N], log of the sum of the exponentials of all logits.
        target_cosine: [N], cosine with the target.
        hardest_cosine: [N], largest cosine among the slots that are neither target nor masked; -inf if there is none.
        hardest_slot: int64 [N], number of that slot; -1 if there is none.
        beats_target: int64 [N], how many of these slots have a larger cosine than the target.
    """

    lse: Tensor
    target_cosine: Tensor
    hardest_cosine: Tensor
    hardest_slot: Tensor
    beats_target: Tensor


@dataclass(slots=True)
class Arguments:
    """What :func:`sst_fast.functional.margin_softmax` is asked to compute; its docstring says what each field means."""

    embedding: Tensor
    prototypes: Tensor
    target: Tensor | None
    positive: Tensor | None = None
    margin: Margin = AMSoftmax(0.35)  # noqa: RUF009 (it is frozen)
    scale: Parameter = 30.0
    reduction: Reduction = "mean"
    weight: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    window: Window | None = None
    identity: Tensor | None = None
    slot_identity: Tensor | None = None
    mask_empty: bool = True
    normalize_prototypes: bool = False
    gradient: GradientRule = "exact"
    product_dtype: torch.dtype | None = None
    sub_centers: int = 1

    @property
    def slots(self) -> int:
        """K: how many classes the rows of ``prototypes`` stand for."""
        return self.prototypes.shape[0] // self.sub_centers

    @property
    def wide(self) -> torch.dtype:
        """In which losses are computed and returned: float32, or float64 if an input is."""
        return wide_dtype(self.embedding, self.prototypes)

    def check(self) -> None:
        """TypeError or ValueError that names the argument, what was expected and what came."""
        embedding, prototypes, target, window = self.embedding, self.prototypes, self.target, self.window
        check_embedding("embedding", embedding)
        n, d = embedding.shape
        device = embedding.device
        check_tensor("prototypes", prototypes, (None, d), QUEUE_DTYPES, device)
        if prototypes.requires_grad and prototypes.dtype == torch.float8_e4m3fn:
            raise TypeError("prototypes in float8_e4m3fn are frozen, got requires_grad=True")
        k = prototypes.shape[0]
        if k == 0:
            raise ValueError("prototypes must have at least one row, got [0, D]")
        if self.sub_centers != 1:
            self._check_sub_centers()
            k = self.slots
        if self.positive is not None:
            check_tensor("positive", self.positive, (n, d), EMBEDDING_DTYPES, device)
        if target is not None:
            check_tensor("target", target, (n,), _INTEGER, device)
        elif self.positive is None:
            raise TypeError("target must be a tensor of row numbers of prototypes unless positive is given, got None")
        if self.identity is not None:
            check_tensor("identity", self.identity, (n,), _INTEGER, device)
            if self.slot_identity is None:
                raise ValueError("identity masks slots of the same identity and needs slot_identity as well, got None")
        if self.slot_identity is not None:
            check_tensor("slot_identity", self.slot_identity, (k,), _INTEGER, device)
        check_margin(self.margin)
        check_scale(self.scale, n, device)
        if self.weight is not None:
            check_tensor("weight", self.weight, (n,), EMBEDDING_DTYPES, device)
            if self.weight.requires_grad:
                raise ValueError("weight must not require a gradient: it is a constant")
        check_options(self.label_smoothing, self.reduction, self.gradient, self.ignore_index)
        if self.product_dtype not in (None, torch.float8_e4m3fn):
            raise ValueError(f"product_dtype must be None or torch.float8_e4m3fn, got {self.product_dtype}")
        if self.reduction == "mean" and n == 0:
            raise ValueError("embedding must have at least one row for reduction='mean', got [0, D]")
        if window is not None:
            check_tensor("window.features", window.features, (None, None, d), QUEUE_DTYPES, device)
            h, b = window.features.shape[:2]
            check_tensor("window.identities", window.identities, (b,), _INTEGER, device)
            check_tensor("window.start", window.start, (), _INTEGER, device)
            if window.features.requires_grad:
                raise ValueError(
                    "window.features must not require a gradient: they are constants, got requires_grad=True"
                )
            if h == 0 or n % h:
                raise ValueError(f"embedding: {n} rows cannot be split evenly over the window's {h} groups")
            if b > k:
                raise ValueError(f"window holds {b} slots, more than the {k} rows of prototypes")

    def _check_sub_centers(self) -> None:
        self.sub_centers = check_count("sub_centers", self.sub_centers, 1)
        if self.sub_centers > MAX_SUB_CENTERS:
            raise ValueError(f"sub_centers must be at most {MAX_SUB_CENTERS}, got {self.sub_centers}")
        if self.prototypes.shape[0] % self.sub_centers:
            raise ValueError(
                f"prototypes must have sub_centers = {self.sub_centers} rows for each class, got {self.prototypes.shape[0]} rows"
            )
        if self.window is not None:
            raise ValueError(
                f"sub_centers must be 1 beside a window: a queue's slot is one row, got {self.sub_centers}"
            )

    def packed(
        self, keep_weights: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor | None], list[int], list[float]]:
        """As the operators take them: embedding, prototypes, positive, tensors, integers, numbers.

        The margin must be one that kernels know (``margin.kind``). ``keep_weights``: see csrc/arguments.h.
        """
        window, scale = self.window, self.scale
        n = self.embedding.shape[0]
        parameters, margin_rows = self.margin.per_row(n)
        scale_rows = scale.double().expand(n) if isinstance(scale, Tensor) else None
        features = identities = start = None
        if window is not None:
            features, identities, start = window.features, window.identities, window.start
            if features.dtype != self.prototypes.dtype:
                features = features.to(self.prototypes.dtype)
        tensors = [
            self.target, self.weight, self.identity, self.slot_identity, features, identities, start, margin_rows, scale_rows,
        ]  # fmt: skip
        integers = [
            self.margin.kind, REDUCTIONS.index(self.reduction), self.ignore_index, self.sub_centers,
            int(self.mask_empty), int(self.normalize_prototypes), int(self.gradient == "straight_through"),
            int(self.product_dtype is not None), int(keep_weights), 0, 0,
        ]  # fmt: skip
        floats = [0.0 if isinstance(scale, Tensor) else float(scale), float(self.label_smoothing), *parameters]
        return self.embedding, self.prototypes, self.positive, tensors, integers, floats


@dataclass
class Packed:
    """What an operator has received, by name: for backends that are written in Python. Fields as in ``csrc/arguments.h``."""

    embedding: Tensor
    prototypes: Tensor
    positive: Tensor | None
    target: Tensor | None
    weight: Tensor | None
    identity: Tensor | None
    slot_identity: Tensor | None
    window: Tensor | None
    window_identity: Tensor | None
    window_start: Tensor | None
    margin_rows: Tensor | None
    scale_rows: Tensor | None
    kind: int
    reduction: int
    ignore_index: int
    sub_centers: int
    mask_empty: bool
    normalize: bool
    straight_through: bool
    float8_products: bool
    keep_weights: bool
    need_scale_gradient: bool
    need_gradient: bool
    scale: float
    label_smoothing: float
    parameters: list[float]

    @staticmethod
    def of(
        embedding: Tensor, prototypes: Tensor, positive: Tensor | None, tensors: list[Tensor | None], integers: list[int],
        numbers: list[float],
    ) -> Packed:  # fmt: skip
        """The reverse of :meth:`Arguments.packed`."""
        named: dict[str, Any] = dict(zip(TENSORS, tensors, strict=True)) | dict(zip(INTEGERS, integers, strict=True))
        for name in INTEGERS[4:]:
            named[name] = bool(named[name])
        named |= dict(zip(NUMBERS, numbers, strict=False))
        return Packed(embedding, prototypes, positive, **named, parameters=list(numbers[len(NUMBERS) :]))


_INTEGER = (torch.int64,)


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if one of them is, otherwise float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def check_options(
    label_smoothing: float = 0.0, reduction: str = "mean", gradient: str = "exact", ignore_index: int = -100
) -> None:
    """TypeError or ValueError unless these options of the loss are valid."""
    if not (isinstance(label_smoothing, Real) and 0 <= label_smoothing < 1):
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing!r}")
    check_word("reduction", reduction, REDUCTIONS)
    check_word("gradient", gradient, GRADIENT_RULES)
    if not isinstance(ignore_index, Integral):
        raise TypeError(f"ignore_index must be an integer, got {ignore_index!r}")


def check_word(name: str, word: object, allowed: tuple[str, ...]) -> None:
    """ValueError unless ``word`` is one of ``allowed``."""
    if word not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {word!r}")


def is_integer(value: object) -> bool:
    """Whether it is an integer, of Python or of NumPy."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is a real number, of Python or of NumPy."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_count(name: str, value: object, least: int) -> int:
    """``value`` as an int; ValueError unless it is an integer, of Python or NumPy, that is at least ``least``."""
    if not is_integer(value) or int(value) < least:  # type: ignore[call-overload]
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    return int(value)  # type: ignore[call-overload, no-any-return]


def check_margin(margin: object) -> None:
    """TypeError unless ``margin`` is one; ValueError where its tensors, on the CPU, hold what they may not."""
    if not isinstance(margin, Margin):
        raise TypeError(f"margin must be a margin of sst_fast.margins, got {type(margin).__name__}")
    if margin.varies and not torch.compiler.is_compiling():
        margin.check_values()


def check_scale(scale: Parameter, n: int | None = None, device: torch.device | None = None) -> None:
    """ValueError unless ``scale`` is a number in (0, MAX_SCALE] or a tensor [] or [n] on ``device`` (None: any).

    The values of a tensor are looked at on the CPU only: elsewhere that would wait for the device.
    """
    if isinstance(scale, Tensor):
        fits = scale.dim() == 0 or (scale.dim() == 1 and n in (None, scale.shape[0]))
        if not scale.is_floating_point() or not fits or (device is not None and scale.device != device):
            raise ValueError(
                f"scale must be a number or a floating-point tensor [{'N' if n is None else n}] or [] on "
                f"{device or 'any device'}, got {scale.dtype} {list(scale.shape)} on {scale.device}"
            )
        if scale.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = ~((scale > 0) & (scale <= MAX_SCALE))  # a NaN is wrong too
            if bool(wrong.any()):
                raise ValueError(
                    f"scale must be > 0 and at most {MAX_SCALE:g}, got a tensor with {scale[wrong][0].item()!r}"
                )
    elif torch.compiler.is_compiling():
        return  # a number that changes has no value yet; the operator looks at it again
    elif (type(scale) is not float and not isinstance(scale, Real)) or not 0 < scale < float("inf"):
        raise ValueError(f"scale must be a finite number > 0, got {scale!r}")
    elif scale > MAX_SCALE:
        raise ValueError(f"scale must be at most {MAX_SCALE:g}, got {scale!r}")


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
    found = value.shape
    fits = len(found) == len(shape)
    if fits:
        for expected_size, size in zip(shape, found, strict=True):
            if expected_size is not None and expected_size != size:
                fits = False
    if not fits:
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{expected}], got {list(found)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device} like the other tensors, got {value.device}")
