"""Several processes (gloo): the gathered queue, the sharded queue, DDP, FSDP2, against one process with the whole batch."""

import contextlib
import os
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from runs import gallery_features, together
from torch import nn

from sst_fast import (
    AMSoftmax,
    CurricularFace,
    GalleryQueue,
    MVSoftmax,
    NPCFace,
    SemiSiamese,
    SemiSiameseLoss,
    distributed,
)
from sst_fast.functional import margin_softmax

B, D, K = 5, 8, 36  # a batch of 10 or 15 does not divide K: windows wrap round


def batches(world, steps=6):
    """The same on every rank: features or images of the whole batch, identities that come again."""
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        ids = (torch.arange(world * B) + 7 * step) % 40
        yield [torch.randn(world * B, D, generator=generator) for _ in range(4)], ids


def close(a, b):
    assert (a - b).norm() <= 2e-5 * max(b.norm().item(), 1e-3), (a, b)


def rows_of(rank):
    return slice(rank * B, (rank + 1) * B)


def check_gathered(rank, world):
    """Values, gradients and queues of W ranks are those of one process with the whole batch."""
    mine = rows_of(rank)
    for margin in (AMSoftmax(0.35), CurricularFace()):
        options = {"margin": margin, "scale": 16.0, "keep": "first"}
        ours = SemiSiameseLoss(GalleryQueue(K, D), **options)
        whole = SemiSiameseLoss(GalleryQueue(K, D), gather=False, **options)
        for features, ids in batches(world):
            leaves = [x.clone().requires_grad_() for x in features[:2]]
            local = [x[mine].clone().requires_grad_() for x in features[:2]]
            loss = ours(*local, *(x[mine] for x in features[2:]), ids[mine])
            expected = whole(*leaves, *features[2:], ids)
            close(distributed.mean(loss), expected.detach())
            gradients = torch.autograd.grad(loss, local)
            for a, b in zip(gradients, torch.autograd.grad(expected, leaves), strict=True):
                close(a, world * b[mine])  # of this rank's own mean
        distributed.assert_same(dict(ours.margin.named_buffers()))
        distributed.assert_same(dict(ours.queue.named_buffers()))
        assert torch.equal(ours.queue.features, whole.queue.features)


def check_sharded(rank, world):
    """Values and gradients are those over all shards laid side by side, the batch's own slots replaced."""
    mine, size = rows_of(rank), 18  # which the batch does not divide
    for margin in (AMSoftmax(0.35), MVSoftmax(), CurricularFace()):
        ours = SemiSiameseLoss(GalleryQueue(size, D, spare=world * B), margin, 16.0, keep="first", shard=True)
        for features, ids in batches(world):
            w, held = (distributed.gather(x[:size]) for x in (ours.queue.features, ours.queue.identities))
            slots = torch.cat([r * size + (ours.queue.state[0] + torch.arange(B)) % size for r in range(world)])
            held[slots] = ids
            leaves = [x.clone().requires_grad_() for x in features[:2]]
            local = [x[mine].clone().requires_grad_() for x in features[:2]]
            loss = ours(*local, *(x[mine] for x in features[2:]), ids[mine])
            expected = 0.0
            for probe, gallery in zip(leaves, (features[3], features[2]), strict=True):
                w[slots] = F.normalize(gallery)
                expected = expected + 0.5 * margin_softmax(
                    probe, w.clone(), slots, margin=ours.margin.current(), scale=16.0, identity=ids, slot_identity=held
                )
            close(distributed.mean(loss), expected.detach())
            gradients = torch.autograd.grad(loss, local)
            for a, b in zip(gradients, torch.autograd.grad(expected, leaves), strict=True):
                close(a, world * b[mine])
        distributed.assert_same(dict(ours.margin.named_buffers()))
        assert len(ours.queue) == size


def check_coin(rank, world):
    """Every rank keeps the same images, though their random numbers differ."""
    torch.manual_seed(rank)
    loss = SemiSiameseLoss(GalleryQueue(K, D))
    for features, ids in batches(world):
        loss(*(x[rows_of(rank)] for x in features), ids[rows_of(rank)])
    distributed.assert_same(dict(loss.queue.named_buffers()))
    assert len(loss.queue) == K


def check_differences_are_named(rank, world):
    with pytest.raises(RuntimeError, match="thing differs between processes: rank 1 from rank 0"):
        distributed.assert_same({"same": torch.ones(3), "thing": torch.tensor([float(rank == 1)])})


def train(model, mine, world, wrapped):
    optimizer = torch.optim.SGD(model.probe.parameters(), 0.5)
    for images, ids in batches(world):
        optimizer.zero_grad()
        wrapped(images[0][mine], images[1][mine], ids[mine]).backward()
        optimizer.step()
        model.update_gallery()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 16), nn.ReLU(), nn.Linear(16, D))


def check_training(rank, world, shard):
    """A few steps of DDP end where one process with the whole batch ends."""
    size, spare = (20, world * B) if shard else (20 * world, 0)
    model = SemiSiamese(network(), SemiSiameseLoss(GalleryQueue(size, D, spare=spare), shard=shard, keep="mean"), 0.5)
    whole = SemiSiameseLoss(GalleryQueue(20 * world, D), gather=False, keep="mean")
    alone = SemiSiamese(network(), whole, 0.5, shuffle=False)
    train(model, rows_of(rank), world, nn.parallel.DistributedDataParallel(model))
    train(alone, slice(None), world, alone)
    for name in ("probe", "gallery"):
        for a, b in zip(getattr(model, name).parameters(), getattr(alone, name).parameters(), strict=True):
            close(a.detach(), b.detach())


def check_shuffling(rank, world):
    """BatchNorm of the gallery network sees images of other ranks; every feature comes back to its place."""
    torch.manual_seed(3)
    backbone = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D))
    model = SemiSiamese(backbone, SemiSiameseLoss(GalleryQueue(K, D)))
    images = next(batches(world))[0][0]
    torch.manual_seed(5 + rank)  # rank 0 decides
    with torch.no_grad():
        found = gallery_features(model, images[rows_of(rank)])
        order = torch.rand(world * B, generator=torch.Generator().manual_seed(5)).argsort()
        shuffled = torch.cat([backbone(part) for part in images[order].chunk(world)])
        close(found, shuffled[order.argsort()][rows_of(rank)])


def check_fsdp(rank, world):
    """Fully sharded networks: the same step as one process."""
    from torch.distributed.fsdp import fully_shard

    model = SemiSiamese(network(), SemiSiameseLoss(GalleryQueue(K, D), keep="first"), 0.5)
    alone = SemiSiamese(network(), SemiSiameseLoss(GalleryQueue(K, D), gather=False, keep="first"), 0.5, shuffle=False)
    mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
    fully_shard(model.probe, mesh=mesh)
    fully_shard(model.gallery, mesh=mesh)
    model.probe.set_force_sum_reduction_for_comms(True)  # as in examples/fsdp2_sst.py
    train(model, rows_of(rank), world, model)
    train(alone, slice(None), world, alone)
    for name in ("probe", "gallery"):
        for a, b in zip(getattr(model, name).parameters(), getattr(alone, name).parameters(), strict=True):
            close(a.full_tensor().detach(), b.detach())


CHECKS = {
    "replicated": (check_coin, check_gathered, check_sharded, partial(check_training, shard=False), partial(check_training, shard=True),
                   check_shuffling, check_differences_are_named),
    "fully sharded": (check_fsdp,),
}  # fmt: skip


def thread_names():
    names = set()
    for task in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            names.add(task.read_text().strip())
    return names


def worker(rank, world, store, checks):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    for check in CHECKS[checks]:
        check(rank, world)
    dist.barrier()
    dist.destroy_process_group()
    if checks == "replicated":
        assert "pt_gloo_runloop" not in thread_names()
    else:  # FSDP2 keeps the group in caches of its own, and threads that outlive the interpreter may abort the process
        os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("checks", CHECKS)
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_equal_one_process(world, checks):
    together(worker, world, checks)


def test_one_process_needs_no_group():
    x = torch.randn(4, 3)
    assert torch.equal(distributed.gather(x), x)
    losses = torch.tensor([0.0, 1e-6, 0.5, 100.0], requires_grad=True)
    combined = distributed.combine_shards(losses)
    assert torch.allclose(combined, losses)
    assert torch.equal(torch.autograd.grad(combined.sum(), losses)[0], torch.ones(4))
    distributed.assert_same({"x": x})


@pytest.mark.parametrize("options", [{"mask_empty": False}, {"label_smoothing": 0.1}, {"margin": NPCFace()}], ids=repr)
def test_what_shards_cannot_do_is_refused(options):
    with pytest.raises(ValueError, match="shard needs mask_empty=True"):
        SemiSiameseLoss(GalleryQueue(8, 4), shard=True, **options)


def test_too_few_spare_rows_are_named():
    loss = SemiSiameseLoss(GalleryQueue(8, 4, spare=2), shard=True)
    with pytest.raises(ValueError, match="spare must be at least 3, the batch of all ranks, got 2"):
        loss(*[torch.randn(3, 4)] * 4, torch.arange(3))
