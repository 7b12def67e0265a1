"""Semi-Siamese Training with both networks fully sharded (FSDP2), on the ORL faces.

``torchrun --nproc_per_node=2 examples/fsdp2_sst.py``
"""

import argparse

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

import sst_fast
from sst_fast import data
from sst_fast.train import backbones


def main(arguments: list[str] | None = None) -> tuple[sst_fast.SemiSiamese, list[float]]:
    """Trains; returns the model and the mean loss of this process in each epoch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args(arguments)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the networks begin alike

    faces = data.Pairs(data.orl().shallow(2, seed=0), size=48, channels=1, seed=0)
    sampler = sst_fast.IdentitySampler(len(faces), batch=10, queue_size=20, rank=rank, world=world)
    loader = DataLoader(faces, batch_sampler=sampler)

    backbone = backbones.build("mobilefacenet", 64, 48, width=0.25, channels=1)
    criterion = sst_fast.SemiSiameseLoss(sst_fast.GalleryQueue(size=20, dim=64), scale=16.0)
    model = sst_fast.SemiSiamese(backbone, criterion, momentum=0.9)
    mesh = dist.device_mesh.init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (world,))
    fully_shard(model.probe, mesh=mesh)  # the queue stays whole: all processes hold the same
    fully_shard(model.gallery, mesh=mesh)
    # PyTorch 2.8 adds gradients up over gloo where it should average them (its issue 162338).
    if dist.get_backend() == "gloo":
        model.probe.set_force_sum_reduction_for_comms(True)
    optimizer = torch.optim.SGD(model.probe.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)

    means = []
    for epoch in range(options.epochs):
        sampler.set_epoch(epoch)
        losses = []
        for batch in loader:
            loss = model(*batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.update_gallery()
            losses.append(loss.item())
        means.append(sum(losses) / len(losses))
        if rank == 0:
            print(f"epoch {epoch}: loss {means[-1]:.3f}")
    return model, means


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
