"""Which identities come in a batch: samplers that know what the gallery queue holds."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch.utils.data import Sampler

from sst_fast.arguments import check_count, is_integer

Scheme = Literal["shuffle", "spaced", "left_out"]


class IdentitySampler(Sampler[list[int]]):
    """Batches of identity numbers for ``DataLoader(batch_sampler=...)``; each identity at most once an epoch.

    An identity that comes again while the queue still holds its feature would be its own negative. The loss masks those
    slots (``mask_identity``), so ``'shuffle'`` is exact too. The other schemes keep such slots from being wasted. The authors'
    codes, which have no mask, use them:

    - ``'shuffle'``: a fresh permutation each epoch.
    - ``'spaced'`` (first release of Du et al., ECCV 2020): the same, but an identity never comes again within
      ``queue_size`` identities. The authors keep the last ``queue_size`` of an epoch out of the first ``queue_size`` of the
      next; here each becomes available again as soon as its slot has been taken.
    - ``'left_out'`` (their FaceX-Zoo): what the queue holds at the end of an epoch is left out of the whole next one, so
      that epochs after the first are shorter.

    No data set is too small. Where too few identities would remain to fill a batch, only the most recent ones are kept
    away, and the mask takes care of the rest.

    Args:
        identities: how many there are, at least two for each process.
        batch: at most so many identities a step, over all processes. An epoch is split evenly, so that no batch is small.
        queue_size: how many identities the queue holds, over all processes (half its slots with ``keep='both'``).
        scheme: see above.
        seed: every choice follows from it and the epoch.
        rank, world: the number of this process, and how many there are. All bring the same number of identities, at least
            two (BatchNorm). The few that are left over wait for the next epoch.

    Call :meth:`set_epoch` before each epoch, as with ``DistributedSampler``. For checkpoints within an epoch also call
    :meth:`step` after each batch that has been trained on. :meth:`state_dict` then goes on after that batch, whatever a loader
    has read ahead, and with any batch size, queue size or number of processes.
    """

    def __init__(
        self, identities: int, batch: int, *, queue_size: int = 0, scheme: Scheme = "shuffle", seed: int = 0,
        rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        if scheme not in get_args(Scheme):
            raise ValueError(f"scheme must be one of {', '.join(map(repr, get_args(Scheme)))}, got {scheme!r}")
        for name, value, least in (("identities", identities, 2 * world), ("batch", batch, 2 * world)):
            if not is_integer(value) or value < least:
                raise ValueError(f"{name} must be at least {least}, two for each of {world} processes, got {value!r}")
        if not 0 <= rank < world:
            raise ValueError(f"rank must be in [0, {world}), got {rank!r}")
        self.identities = int(identities)
        self.batch = int(batch)
        self.queue_size = check_count("queue_size", queue_size, 0)
        self.scheme = scheme
        self.seed = seed
        self.rank = rank
        self.world = world
        self.epoch = 0
        self.done = 0  # identities of this epoch that have been trained on
        self.recent: list[int] = []  # drawn before this epoch, oldest first, each once
        self.order = self._draw()

    def __iter__(self) -> Iterator[list[int]]:
        begin = self.done
        for size in self._sizes():
            share = size // self.world
            first = begin + self.rank * share
            yield self.order[first : first + share]
            begin += size

    def __len__(self) -> int:
        """Batches left in this epoch."""
        return len(self._sizes())

    def step(self) -> None:
        """A batch has been trained on."""
        self.done += self._sizes()[0]

    def _sizes(self) -> list[int]:
        """Of the batches left, over all processes: as even as can be, none above ``batch``; the larger ones come first, so
        that those left after each step are the same again."""
        left, most = (len(self.order) - self.done) // self.world, self.batch // self.world
        count = -(-left // most)
        if count and left // count < 2:  # an odd one out among pairs
            count -= 1
            left = 2 * count
        return [self.world * (left // count + (i < left % count)) for i in range(count)]

    def set_epoch(self, epoch: int) -> None:
        """Goes to this epoch, and to its beginning unless it is already there."""
        if epoch == self.epoch:
            return
        if epoch < self.epoch:
            self.epoch, self.recent = 0, []
            self.order = self._draw()
        while self.epoch < epoch:
            # The newest occurrence of each identity counts. An epoch has each once, and a long one fills the queue alone.
            drawn = self.order if len(self.order) >= self.queue_size else self.recent + self.order
            drawn = drawn[max(0, len(drawn) - self.queue_size - len(self.recent)) :]
            self.recent = list(dict.fromkeys(reversed(drawn)))[: self.queue_size][::-1]
            self.epoch += 1
            self.order = self._draw()
        self.done = 0

    def state_dict(self) -> dict[str, Any]:
        """Epoch, position in it, its order, and what came before."""
        return {
            "epoch": self.epoch,
            "done": self.done,
            "order": torch.tensor(self.order, dtype=torch.int32),
            "recent": torch.tensor(self.recent, dtype=torch.int32),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`.

        Raises:
            ValueError: it belongs to a data set with other identities.
        """
        order = state["order"].tolist()
        if order and max(order) >= self.identities:
            raise ValueError(f"state: holds identity {max(order)}, but identities={self.identities}")
        self.epoch, self.done = int(state["epoch"]), int(state["done"])
        self.order, self.recent = order, state["recent"].tolist()

    def _draw(self) -> list[int]:
        """This epoch's order."""
        rng = random.Random(f"{self.seed}/{self.epoch}")
        # How many of the most recent can be kept away, and still leave a batch to choose.
        away = self.recent[max(0, len(self.recent) - max(0, self.identities - self.batch)) :]
        away = away if self.scheme != "shuffle" else []
        kept = set(away)
        pool = [i for i in range(self.identities) if i not in kept]
        if self.scheme == "left_out":
            away = []
        rng.shuffle(pool)
        if not away:
            return pool[::-1]
        order = []
        # Each draw frees the oldest of those kept away.
        for freed in [*away, *([None] * len(pool))]:
            at = rng.randrange(len(pool))
            pool[at], pool[-1] = pool[-1], pool[at]
            order.append(pool.pop())
            if freed is not None:
                pool.append(freed)
        return order
