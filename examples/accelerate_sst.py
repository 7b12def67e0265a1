"""Semi-Siamese Training under Accelerate, on the ORL faces: ``pip install accelerate``.

``accelerate launch examples/accelerate_sst.py``, or python for one process. What differs from a usual script: the gallery network
follows after each optimizer step, and only the probe network has an optimizer.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

import sst_fast
from sst_fast import data
from sst_fast.train import backbones


def main(arguments: list[str] | None = None) -> tuple[sst_fast.SemiSiamese, list[float]]:
    """Trains; returns the model and the mean loss of this process in each epoch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    options = parser.parse_args(arguments)
    accelerator = Accelerator(cpu=options.cpu)
    set_seed(0)

    faces = data.Pairs(data.orl().shallow(2, seed=0), size=48, channels=1, seed=0)
    loader = DataLoader(faces, batch_size=10, shuffle=True, drop_last=True)
    backbone = backbones.build("mobilefacenet", 64, 48, width=0.25, channels=1)
    criterion = sst_fast.SemiSiameseLoss(sst_fast.GalleryQueue(size=20, dim=64), scale=16.0)
    model = sst_fast.SemiSiamese(backbone, criterion, momentum=0.9)
    optimizer = torch.optim.SGD(model.probe.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    means = []
    for epoch in range(options.epochs):
        losses = []
        for batch in loader:
            loss = wrapped(*batch)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            model.update_gallery()
            losses.append(loss.item())
        means.append(sum(losses) / len(losses))
        accelerator.print(f"epoch {epoch}: loss {means[-1]:.3f}")
    accelerator.end_training()
    return model, means


if __name__ == "__main__":
    main()
