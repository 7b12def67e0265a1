"""State dicts of other projects' heads, renamed for ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sst_fast.arguments import check_word

Source = Literal["insightface", "pytorch-metric-learning", "facex-zoo", "adaface", "uniface"]


class Entry(NamedTuple):
    """What becomes of one of their tensors with ``dims`` dimensions: ``name`` is ours, '' where our heads have no such tensor."""

    name: str
    dims: int
    transposed: bool = False


CLASSES_FIRST, CLASSES_LAST = Entry("weight", 2), Entry("weight", 2, transposed=True)
KNOWN: dict[Source, dict[str, Entry]] = {
    # partial_fc_v2.py
    "insightface": {"weight": CLASSES_FIRST},
    # losses/large_margin_softmax_loss.py, normalized_softmax_loss.py
    "pytorch-metric-learning": {"W": CLASSES_LAST},
    # head/*.py: "kernel" of CurricularFace, NPCFace and Adam_Softmax, "W" of AdaCos, "weight" of the others
    "facex-zoo": {
        "weight": CLASSES_LAST, "kernel": CLASSES_LAST, "W": CLASSES_FIRST, "t": Entry("margin.t", 1),
        "adam": Entry("margins", 2),
    },
    # Unified_Cross_Entropy_Loss in backbone.py
    "uniface": {"weight": CLASSES_FIRST, "bias": Entry("bias", 1), "weight_mom": Entry("", 2)},
    # head.py; its t never changes
    "adaface": {
        "kernel": CLASSES_LAST, "batch_mean": Entry("margin.mean", 1), "batch_std": Entry("margin.std", 1), "t": Entry("", 1),
    },
}  # fmt: skip


def convert(state_dict: Mapping[str, Any] | Sequence[Mapping[str, Any]], source: Source) -> dict[str, Tensor]:
    """The state dict of our head from that of another project's head.

    Args:
        state_dict: the head's state dict. It may also be that of a model whose head is called ``head``; the model's other tensors are
            left out. A leading ``module.`` in names is removed. For insightface it may be a list: one state dict for each rank, in
            the order of ranks.
        source: 'insightface' (arcface_torch's partial FC), 'pytorch-metric-learning', 'facex-zoo', 'adaface' or 'uniface'.

    Returns:
        What ``load_state_dict`` of our head takes: ``weight`` [classes, dim], and for some heads more, such as ``margin.t`` of
        CurricularFace. Dtypes and devices are unchanged. Tensors share memory with ``state_dict``, except the weight that is joined
        from a list. FaceX-Zoo does not save AdaCos' scale. So ``margin.scale`` is 0, and the scale starts anew.

    Raises:
        ValueError: ``source`` is unknown; an entry is no tensor, has the wrong number of dimensions or has no counterpart in our
            head; there are no weights.
    """
    check_word("source", source, get_args(Source))
    if isinstance(state_dict, Mapping):
        return _convert(state_dict, source)
    if source != "insightface" or not len(state_dict):
        raise ValueError(
            f"state_dict must be a mapping, or a list of at least one from insightface, got {len(state_dict)} from {source}"
        )
    parts = [_convert(part, source)["weight"] for part in state_dict]
    return {"weight": torch.cat(parts)}


def _convert(state: Mapping[str, Any], source: Source) -> dict[str, Tensor]:
    known = KNOWN[source]
    theirs = {name.removeprefix("module."): value for name, value in state.items()}
    for name, value in theirs.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"state_dict must map names to tensors, got {type(value).__name__} as {name!r}: of a checkpoint, pass the "
                "entry that holds the head's state"
            )
    if any(name.startswith("head.") for name in theirs):
        theirs = {name.removeprefix("head."): value for name, value in theirs.items() if name.startswith("head.")}
    if source == "facex-zoo" and "queue" in theirs:
        raise ValueError(
            "state_dict: FaceX-Zoo saves SST_Prototype's queue without its identities and position, so it cannot be "
            "continued; start with an empty queue"
        )
    found = {}
    for name, value in theirs.items():
        if name not in known:
            raise ValueError(f"state_dict: {name!r} of {source} has no counterpart, expected {', '.join(known)}")
        entry = known[name]
        if value.dim() != entry.dims:
            raise ValueError(f"state_dict: {name!r} must have {entry.dims} dimensions, got {list(value.shape)}")
        if entry.transposed:
            value = value.T
        if entry.name:
            found[entry.name] = value.reshape(
                {"weight": value.shape, "margins": (-1,), "bias": (1,)}.get(entry.name, ())
            )
    if "weight" not in found:
        weights = [name for name, entry in known.items() if entry.name == "weight"]
        raise ValueError(
            f"state_dict: no weights, expected {' or '.join(weights)}, got {', '.join(theirs) or 'nothing'}"
        )
    if source == "facex-zoo" and "W" in theirs:
        found["margin.scale"] = torch.zeros(())
    return found
