"""What losses over several processes share."""

from __future__ import annotations

from torch import Tensor, nn

from sst_fast import distributed


class OverRanks(nn.Module):
    """A loss whose ranks exchange embeddings. Its settings must be the same on all ranks.

    Args:
        gather: with several processes, exchange embeddings (True) or use this rank's alone (False).
        group: the process group; None: all processes.
        settings: name -> value. ``print(loss)`` shows them. They are compared between ranks, together with what ``print`` shows of
            submodules.
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
        """(rank, number of ranks W) of the exchange; (0, 1) without one. Settings are compared in the first call, batch sizes in each.

        Raises:
            ValueError: settings or batch sizes differ between ranks; raised on every rank.
        """
        rank, world = distributed.ranks(self.group) if self.gather else (0, 1)
        if world > 1:
            if not self.agreed:
                settings = f"{self} of {embedding.dtype} [B, {embedding.shape[1]}]"
                distributed.assert_agreed({"settings": " ".join(settings.split())}, None, embedding.device, self.group)
                self.agreed = True
            distributed.assert_same_batch(embedding, self.group)
        return rank, world
