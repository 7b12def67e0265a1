"""The gallery queue: a ring of unit features with their identities, written in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sst_fast import ops, reference
from sst_fast.arguments import EMBEDDING_DTYPES, QUEUE_DTYPES, Window, check_count, check_tensor, is_integer


class GalleryQueue(nn.Module):
    """The last ``size`` gallery features, used as class prototypes (Du et al., ECCV 2020).

    Holds buffers only, all of them in the state dict, so that a run resumes exactly. A slot is empty (identity -1)
    until it is first written, and again after it is dequeued. Position and fill live on the device, so :meth:`enqueue`,
    :meth:`dequeue` and :meth:`window` do not wait for it.

    Slots are taken in rising order, and from slot 0 again after the last. The oldest one is at the position ``state[0]`` less
    the fill ``state[1]``, modulo K. :meth:`age` tells how old each one is.

    Args:
        size: number of slots K > 0; 16,384 in the paper. Need not be a multiple of the batch.
        dim: number of features D > 0.
        dtype: of the features: float32 (default), float64, bfloat16, float16 or float8_e4m3fn.
        device: where the buffers live.
        spare: rows beyond the slots, in which a sharded loss shows its batch (:class:`sst_fast.SemiSiameseLoss`).
        random: fill the slots with random unit vectors instead of zeros, as the authors' code does. They stay empty: only a
            loss with ``mask_empty=False`` sees them, as negatives.
        backend: force an implementation, see :func:`sst_fast.backends`.
    """

    features: Tensor  # [K + spare, D], unit rows; whatever an empty slot holds is masked
    identities: Tensor  # int64 [K + spare], -1 = empty
    state: Tensor  # int64 [4]: slot written next, fill, counter of the CUDA kernel, rows rejected (csrc/ring.h)

    def __init__(
        self,
        size: int,
        dim: int,
        dtype: torch.dtype = torch.float32,
        *,
        device: torch.device | str | None = None,
        spare: int = 0,
        random: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        size, dim, spare = check_count("size", size, 1), check_count("dim", dim, 1), check_count("spare", spare, 0)
        if dtype not in QUEUE_DTYPES:
            raise TypeError(f"dtype must be float64, float32, bfloat16, float16 or float8_e4m3fn, got {dtype}")
        self.backend = backend
        self.spare = spare
        features = torch.zeros(size + spare, dim, dtype=dtype, device=device)
        if random:
            features = reference.normalize(torch.randn(size + spare, dim, device=device)).to(dtype)
        self.register_buffer("features", features)
        self.register_buffer("identities", torch.full((size + spare,), -1, dtype=torch.int64, device=device))
        self.register_buffer("state", torch.zeros(4, dtype=torch.int64, device=device))

    @property
    def size(self) -> int:
        """Number of slots K."""
        return self.features.shape[0] - self.spare

    @property
    def dim(self) -> int:
        """Number of features D."""
        return self.features.shape[1]

    def __len__(self) -> int:
        """Number of filled slots. Waits for the device."""
        return int(self.state[1])

    @property
    def rejected(self) -> int:
        """How many rows :meth:`enqueue` has refused so far because they were not finite. Waits for the device."""
        return int(self.state[3])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Takes states of three numbers too, from before rejected rows were counted."""
        name = prefix + "state"
        if name in state_dict and state_dict[name].shape == (3,):
            state_dict[name] = torch.nn.functional.pad(state_dict[name], (0, 1))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """Sizes and dtype, for ``print(queue)``."""
        return f"size={self.size}, dim={self.dim}, dtype={self.features.dtype}"

    def enqueue(self, features: Tensor, identities: Tensor, *, unit: bool = False) -> None:
        """Normalises ``features`` [B, D] and writes them over the oldest slots, in place and in order.

        A row that is not finite, as after an overflow in half precision, would make every later loss NaN. So its slot is taken
        but stays empty, and :attr:`rejected` counts it.

        Args:
            features: [B, D], floating point, B <= K; their gradient is ignored.
            identities: int64 [B], >= 0. Checked on the CPU only: elsewhere the check would have to wait for the device.
            unit: the features have length 1 already, as a window's have, and are written as they are.

        Raises:
            TypeError, ValueError: wrong dtype, shape, device or value, more rows than the queue has slots, or a state whose
                position or fill is outside the queue (checked on the CPU only).
        """
        self._check(features, identities, QUEUE_DTYPES if unit else EMBEDDING_DTYPES)
        self._write(features.detach(), identities, unit, None)

    def enqueue_window(self, window: Window, group: Tensor | int = 0) -> None:
        """Writes into the queue what one group sees in a window of :meth:`window`. Nothing else may be enqueued in between.

        Args:
            window: its rows have length 1 and the queue's dtype already, so they are copied.
            group: which of the H groups: a number, or a 0-d int64 tensor that stays on the device.

        Raises:
            TypeError, ValueError: as :meth:`enqueue`.
            IndexError: there is no such group (a tensor's value is checked on the CPU only; elsewhere the nearest is taken).
        """
        self._check(window.features[0], window.identities, QUEUE_DTYPES, count_only=True)
        if isinstance(group, Tensor):
            check_tensor("group", group, (), (torch.int64,), self.features.device)
            self._write(window.features, window.identities, True, group)
        elif is_integer(group) and 0 <= group < len(window.features):
            self._write(window.features[group], window.identities, True, None)
        else:
            raise IndexError(f"group must be an integer in [0, {len(window.features)}), got {group!r}")

    def _write(self, features: Tensor, identities: Tensor, unit: bool, group: Tensor | None) -> None:
        ring, held = self._slots() if self.spare else (self.features, self.identities)
        ops.enqueue(features, identities, ring, held, self.state, unit, group, self.backend)

    def _slots(self) -> tuple[Tensor, Tensor]:
        """Features and identities without the spare rows."""
        return self.features[: self.size], self.identities[: self.size]

    def dequeue(self, count: int) -> Tensor:
        """Empties the ``count`` oldest slots, in place.

        Returns:
            Their identities, int64 [count], oldest first; -1 where fewer were filled.

        Raises:
            ValueError: ``count`` is not in [0, K], or the state as for :meth:`enqueue`.
        """
        if not is_integer(count) or not 0 <= count <= self.size:
            raise ValueError(f"count must be in [0, {self.size}], got {count!r}")
        return ops.dequeue(int(count), self.identities[: self.size], self.state, self.backend)

    def clear(self) -> None:
        """Empties every slot and starts at slot 0 again."""
        self.identities.fill_(-1)
        self.state[:2] = 0

    def load_newest(self, *states: Mapping[str, Tensor], rank: int = 0, world: int = 1) -> tuple[int, int]:
        """Empties the queue and takes over the newest features of other queues, whatever their size and dtype.

        Args:
            states: state dicts of the queues: one, or all shards of one.
            rank, world: this queue is shard number ``rank`` of ``world``, and takes its share.

        Returns:
            How many features were kept, and how many there were, in all shards.

        Raises:
            ValueError: the features have another size.
        """
        rows = []  # (age, shard, row)
        for shard, state in enumerate(states):
            if state["features"].shape[1] != self.dim:
                raise ValueError(f"states must hold features of size {self.dim}, got {state['features'].shape[1]}")
            begin, ids = int(state["state"][0]), state["identities"]
            # From the oldest: what follows the position, then what precedes it; spare rows and empty slots have no identity.
            order = torch.cat([torch.arange(begin, len(ids)), torch.arange(begin)])
            order = order[ids.cpu()[order] >= 0].flip(0)
            rows.append(torch.stack([torch.arange(len(order)), torch.full_like(order, shard), order], 1))
        newest = torch.cat(rows)
        newest = newest[(newest[:, 0] * len(states) + newest[:, 1]).argsort()]
        mine = newest[rank::world][: self.size].flip(0)
        self.clear()
        for shard, state in enumerate(states):
            here = (mine[:, 1] == shard).nonzero().flatten().to(self.state.device)
            there = mine[mine[:, 1] == shard, 2]
            features = reference.taken(state["features"], there.to(state["features"].device)).to(self.features)
            self.features.view(torch.uint8)[here] = features.view(torch.uint8)
            self.identities[here] = state["identities"][there.to(state["identities"].device)].to(self.state.device)
        self.state[0], self.state[1] = len(mine) % self.size, len(mine)
        return min(len(newest), self.size * world), len(newest)

    def window(self, features: Tensor | Sequence[Tensor], identities: Tensor) -> Window:
        """The slots that the next :meth:`enqueue` of B rows will take, as the loss needs them.

        Take it before the batch is enqueued. It stays valid afterwards. Where a row is not finite, the loss of the probe whose
        target it is becomes NaN, so that a gradient scaler skips the step. It is nobody's negative: its identity becomes -1.

        Args:
            features: what each of H groups of probes shall see there: [H, B, D], a sequence of H tensors [B, D], or [B, D]
                for H = 1. Normalised here.
            identities: int64 [B], >= 0.
        """
        unit, start, targets, owners, held = self._unit(features, identities)
        return Window(unit, held, start, targets.narrow(0, 0, identities.shape[0]), targets, owners)

    def shard_window(
        self, features: Tensor | Sequence[Tensor], identities: Tensor, own: slice
    ) -> tuple[Window, Tensor]:
        """As :meth:`window`, for a queue that is one shard of several. All ranks' features stand in its spare rows, as targets.

        Args:
            features: [H, W B, D] of all ranks; normalised here.
            identities: int64 [W B].
            own: which of them the next :meth:`enqueue` will write here. The others are negatives of other shards.

        Returns:
            The window, and the slots' identities [K + spare] without those that the batch will overwrite.

        Raises:
            ValueError: as :meth:`window`, and if ``spare`` is less than W B.
        """
        if len(identities) > self.spare:
            raise ValueError(f"spare must be at least {len(identities)}, the batch of all ranks, got {self.spare}")
        unit, start, _, owners, seen = self._unit(features, identities)
        mine = torch.full_like(identities, -1)
        mine[own] = seen[own]
        held = self.identities.clone()
        held.index_fill_(0, reference.window_slots(start, len(identities[own]), self.size), -1)
        slots = torch.arange(self.size, self.size + len(identities), device=self.state.device)
        return Window(unit, mine, slots[0].clone(), slots, slots.repeat(len(unit)), owners), held

    def _unit(
        self, features: Tensor | Sequence[Tensor], identities: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Checks the batch; see the operator ``window`` (csrc/ops.h) for the result."""
        if isinstance(features, Tensor):
            if features.dim() not in (2, 3):
                raise ValueError(f"features must have shape [H, B, D] or [B, D], got {list(features.shape)}")
            features = [features] if features.dim() == 2 else features.unbind(0)
        if not len(features):
            raise ValueError("features must have at least one group, got [0, B, D]")
        first = features[0]
        self._check(first, identities, EMBEDDING_DTYPES, count_only=True)
        for other in features[1:]:
            if other.shape != first.shape or other.dtype != first.dtype or other.device != first.device:
                raise ValueError(
                    f"features: every group must be {first.dtype} {list(first.shape)} on {first.device}, "
                    f"got {other.dtype} {list(other.shape)} on {other.device}"
                )
        ring = self.features
        return ops.window(features, identities, self.state, ring.shape[0] - self.spare, ring.dtype, self.backend)

    def age(self) -> Tensor:
        """int64 [K]: how many features were written after each slot's; -1 for an empty slot."""
        slots = torch.arange(self.size, device=self.state.device)
        return torch.where(self.identities[: self.size] >= 0, (self.state[0] - 1 - slots) % self.size, -1)

    def contains(self, identities: Tensor) -> Tensor:
        """bool, same shape as ``identities`` (int64): which of them the queue holds. Does not leave the device."""
        return torch.isin(identities, self.identities) & (identities >= 0)

    def _check(
        self, features: Tensor, identities: Tensor, dtypes: tuple[torch.dtype, ...], count_only: bool = False
    ) -> None:  # fmt: skip
        """``count_only``: the operator looks at the identities' values itself."""
        ring = self.features
        device, size = ring.device, ring.shape[0] - self.spare
        check_tensor("features", features, (None, ring.shape[1]), dtypes, device)
        check_tensor("identities", identities, (features.shape[0],), (torch.int64,), device)
        if features.shape[0] > size:
            raise ValueError(f"features: a batch of {len(features)} does not fit into a queue of {size} slots")
        if count_only or device.type != "cpu" or torch.compiler.is_compiling():
            return
        if bool((identities < 0).any()):
            raise ValueError(f"identities must be >= 0 (-1 marks an empty slot), got {int(identities.min())}")
