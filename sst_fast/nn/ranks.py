"""What losses over several processes share."""

from __future__ import annotations

from torch import Tensor, nn

from sst_fast import distributed


class OverRanks(nn.Module):
    """A loss whose ranks exchange embeddings, and must agree on its settings.

    Args:
        gather: with several processes, exchange (True) or stay alone.
        group: the process group; None: all processes.
        settings: what ``print(loss)`` shows and all ranks must have alike, beside what submodules show.
    """

    def __init__(self, gather: bool, group: distributed.Group, settings: dict[str, object]) -> None:
        super().__init__()
        self.gather = gather
        self.group = group
        self.settings = settings
        self.agreed = False

    def extra_repr(self) -> str:
        """Settings, for ``print(loss)``."""
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())

    def meet(self, embedding: Tensor) -> tuple[int, int]:
        """(rank, number of ranks W) of those that exchange; their settings are compared once, their batch sizes each time.

        Raises:
            ValueError: they differ; on every rank.
        """
        rank, world = distributed.ranks(self.group) if self.gather else (0, 1)
        if world > 1:
            if not self.agreed:
                settings = f"{self} of {embedding.dtype} [B, {embedding.shape[1]}]"
                distributed.assert_agreed({"settings": " ".join(settings.split())}, None, embedding.device, self.group)
                self.agreed = True
            distributed.assert_same_batch(embedding, self.group)
        return rank, world
