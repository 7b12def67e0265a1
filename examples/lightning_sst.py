"""Semi-Siamese Training under Lightning, on the ORL faces: ``pip install lightning``, then run this file.

The model is used as it is. What it needs beyond a usual LightningModule: the gallery network follows after each optimizer
step, and the sampler's place goes into the checkpoint (queue and gallery network are there already, as buffers and weights).
"""

import argparse
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader

import sst_fast
from sst_fast import data
from sst_fast.train import backbones


class SemiSiameseModule(lightning.LightningModule):
    """Trains ``model.probe``; ``model`` holds gallery network and queue."""

    def __init__(self, model: sst_fast.SemiSiamese, sampler: sst_fast.IdentitySampler, lr: float) -> None:
        super().__init__()
        self.model, self.sampler, self.lr = model, sampler, lr

    def on_train_epoch_start(self) -> None:
        """A new order of identities."""
        self.sampler.set_epoch(self.current_epoch)

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        """Loss of two images per identity."""
        loss: torch.Tensor = self.model(*batch)
        seen = self.model.criterion.statistics
        self.log_dict({"loss": loss, "target_cosine": seen.target_cosine.mean()}, prog_bar=True)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Then the gallery network follows."""
        super().optimizer_step(*args, **kwargs)
        self.model.update_gallery()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """As in the authors' recipe."""
        return torch.optim.SGD(self.model.probe.parameters(), self.lr, momentum=0.9, weight_decay=5e-4)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The sampler's place."""
        checkpoint["sampler"] = self.sampler.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """And back."""
        self.sampler.load_state_dict(checkpoint["sampler"])


def main(arguments: list[str] | None = None) -> SemiSiameseModule:
    """Trains and returns the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", default="runs/lightning")
    parser.add_argument("--resume", default=None, help="a checkpoint that Lightning wrote")
    options = parser.parse_args(arguments)
    lightning.seed_everything(0)

    faces = data.orl().shallow(2, seed=0)
    pairs = data.Pairs(faces, size=48, channels=1, seed=0)
    sampler = sst_fast.IdentitySampler(len(pairs), batch=10, queue_size=20, scheme="spaced")
    queue = sst_fast.GalleryQueue(size=20, dim=64)
    backbone = backbones.build("mobilefacenet", 64, 48, width=0.25, channels=1)
    model = sst_fast.SemiSiamese(backbone, sst_fast.SemiSiameseLoss(queue), momentum=0.99)

    module = SemiSiameseModule(model, sampler, lr=0.05)
    # Our sampler shares the batch between processes itself (rank, world).
    settings = {"use_distributed_sampler": False, "log_every_n_steps": 1, "num_sanity_val_steps": 0}
    trainer = lightning.Trainer(max_epochs=options.epochs, default_root_dir=options.out, **settings)
    trainer.fit(module, DataLoader(pairs, batch_sampler=sampler), ckpt_path=options.resume)
    return module


if __name__ == "__main__":
    main()
