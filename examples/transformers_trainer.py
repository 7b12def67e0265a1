"""A margin head in the Trainer of Hugging Face's transformers, on the ORL faces: ``pip install transformers accelerate``.

The network gives embeddings; the loss is the Trainer's to ask for (``compute_loss``). The head is a part of the model, so that
its class weights are trained, saved and moved with it.
"""

import argparse
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import sst_fast
from sst_fast import data
from sst_fast.train import backbones


class Faces(nn.Module):
    """A network and the class weights."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.network = backbones.build("mobilefacenet", 64, 48, width=0.25, channels=1)
        self.head = sst_fast.MarginSoftmaxHead(classes, 64, sst_fast.ArcSoftmax(0.3), scale=16.0)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Loss and embeddings. Under the Trainer's wrappers (DDP, autocast) all that has parameters runs in here."""
        embedding = self.network(pixel_values)
        return {"loss": self.head(embedding, labels), "embedding": embedding}


class FaceTrainer(Trainer):
    """Takes the model's own loss."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over the batch."""
        outputs = model(**inputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]


def collate(pairs: list[tuple[torch.Tensor, torch.Tensor, int]]) -> dict[str, torch.Tensor]:
    """Both images of each identity."""
    first, second, identity = torch.utils.data.default_collate(pairs)
    return {"pixel_values": torch.cat([first, second]), "labels": identity.repeat(2)}


def main(arguments: list[str] | None = None) -> FaceTrainer:
    """Trains and returns the trainer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", default="runs/transformers")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    faces = data.Pairs(data.orl().shallow(2, seed=0), size=48, channels=1, seed=0)
    settings = TrainingArguments(
        options.out, num_train_epochs=options.epochs, per_device_train_batch_size=10, learning_rate=2e-3,
        logging_steps=1, report_to="none", remove_unused_columns=False, save_strategy="no", seed=0,
    )  # fmt: skip
    trainer = FaceTrainer(Faces(len(faces)), settings, train_dataset=faces, data_collator=collate)
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
