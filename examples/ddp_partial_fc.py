"""Class weights shared out over processes, the network in DistributedDataParallel, on the ORL faces.

``torchrun --nproc_per_node=2 examples/ddp_partial_fc.py``, or without torchrun for one process.
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import sst_fast
from sst_fast import data
from sst_fast.nn import PartialFC, RowSGD
from sst_fast.train import backbones


def main(arguments: list[str] | None = None) -> tuple[PartialFC, list[float]]:
    """Trains; returns this process's part of the class weights and the mean loss of each epoch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args(arguments)
    if "RANK" in os.environ and not dist.is_initialized():  # torchrun says so
        dist.init_process_group("gloo")
    torch.manual_seed(0)

    faces = data.Pairs(data.orl().shallow(2, seed=0), size=48, channels=1, seed=0)
    sampler = DistributedSampler(faces, drop_last=True) if dist.is_initialized() else None
    loader = DataLoader(faces, batch_size=10, sampler=sampler, shuffle=sampler is None, drop_last=True)

    network = backbones.build("mobilefacenet", 64, 48, width=0.25, channels=1)
    if dist.is_initialized():
        network = DistributedDataParallel(network)
    # The head stays outside: every process has other classes.
    head = PartialFC(classes=len(faces), dim=64, margin=sst_fast.ArcSoftmax(0.3), scale=16.0, sample_rate=0.5)
    parameters = [*network.parameters(), *head.parameters()]
    optimizer = RowSGD(parameters, lr=0.02, momentum=0.9, weight_decay=5e-4)

    means = []
    for epoch in range(options.epochs):
        if sampler is not None:
            sampler.set_epoch(epoch)
        losses = []
        for image_a, image_b, identity in loader:
            loss = head(network(torch.cat([image_a, image_b])), identity.repeat(2))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            optimizer.step()
            losses.append(loss.item())  # of all processes' images, on each of them
        means.append(sum(losses) / len(losses))
        if head.rank == 0:
            print(f"epoch {epoch}: loss {means[-1]:.3f}")
    return head, means


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
