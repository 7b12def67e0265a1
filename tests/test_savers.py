"""A model half way through its training, saved and loaded by the libraries that people save with."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from runs import together
from torch import nn

from sst_fast import AMSoftmax, CurricularFace, GalleryQueue, SemiSiamese, SemiSiameseLoss

pytestmark = pytest.mark.usefixtures("one_thread")


def model_of(seed: int, shard: bool = False, batch: int = 3) -> SemiSiamese:
    torch.manual_seed(seed)
    queue = GalleryQueue(8, 4, torch.bfloat16, spare=2 * batch if shard else 0)
    criterion = SemiSiameseLoss(queue, margin=AMSoftmax() if shard else CurricularFace(), shard=shard)
    return SemiSiamese(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), criterion, 0.9, galleries=2)


def train(model: SemiSiamese, steps: int) -> SemiSiamese:
    for _ in range(steps):
        model(torch.randn(3, 6), torch.randn(3, 6), torch.arange(3)).backward()
        with torch.no_grad():
            for parameter in model.probe.parameters():
                parameter -= 0.1 * parameter.grad
        model.update_gallery()
    return model


def assert_same(a: SemiSiamese, b: SemiSiamese) -> None:
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name
    assert (a.updates, a.turn) == (b.updates, b.turn)


def test_plain_state_dicts_and_those_of_older_versions():
    old, new = train(model_of(0), 3), model_of(1)
    state = old.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    new.load_state_dict(state)
    assert_same(old, new)
    before = model_of(1)
    before.load_state_dict({**state, "_extra_state": {"updates": 3}})  # as it was written until it became a tensor
    assert_same(old, before)


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    old, new = train(model_of(0), 3), model_of(1)
    safetensors.save_model(old, str(tmp_path / "model.safetensors"))
    assert safetensors.load_model(new, str(tmp_path / "model.safetensors")) == (set(), [])
    assert_same(old, new)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
def test_accelerate(tmp_path, safe):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    old = train(accelerator.prepare(model_of(0)), 3)
    accelerator.save_state(str(tmp_path), safe_serialization=safe)
    expected = {name: value.clone() for name, value in old.state_dict().items()}
    train(old, 2)
    accelerator.load_state(str(tmp_path))
    assert all(torch.equal(value, expected[name]) for name, value in old.state_dict().items())
    assert (old.updates, old.turn) == (3, 1)


def by_pytorch(folder: str, rank: int = 0) -> None:
    """torch.distributed.checkpoint: with plain state dicts, and with its own helpers for a wrapped model."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as helpers

    wrap = nn.parallel.DistributedDataParallel if dist.is_initialized() else lambda model: model
    old = train(model_of(0), 3)
    if dist.is_initialized():  # as DistributedDataParallel keeps the ranks
        for value in old.state_dict().values():
            dist.broadcast(value.view(torch.uint8) if value.dim() else value, 0)
    dcp.save({"model": old.state_dict()}, checkpoint_id=f"{folder}/plain")
    new = model_of(1)
    state = {"model": new.state_dict()}
    dcp.load(state, checkpoint_id=f"{folder}/plain")
    new.load_state_dict(state["model"])
    assert_same(old, new)

    dcp.save({"model": helpers.get_model_state_dict(wrap(old))}, checkpoint_id=f"{folder}/helpers")
    new = model_of(1)
    wrapped = wrap(new)
    state = {"model": helpers.get_model_state_dict(wrapped)}
    dcp.load(state, checkpoint_id=f"{folder}/helpers")
    helpers.set_model_state_dict(wrapped, state["model"])
    assert_same(old, new)


def by_pytorch_in_shards(folder: str, rank: int) -> None:
    """Every rank's queue is another, so it is saved under a name of its own, as SemiSiameseLoss says."""
    import torch.distributed.checkpoint as dcp

    def state_of(model):  # without the queue among the model's: both would be loaded into the same memory
        shared = {name: value for name, value in model.state_dict().items() if ".queue." not in name}
        return {"model": shared, f"queue {rank}": model.criterion.queue.state_dict()}

    old, new = model_of(0, shard=True), model_of(1, shard=True)
    torch.manual_seed(rank)
    for _ in range(3):
        old(torch.randn(3, 6), torch.randn(3, 6), torch.arange(3) + 3 * rank)
    dcp.save(state_of(old), checkpoint_id=f"{folder}/shards")
    state = state_of(new)
    dcp.load(state, checkpoint_id=f"{folder}/shards")
    new.load_state_dict(state["model"], strict=False)
    new.criterion.queue.load_state_dict(state[f"queue {rank}"])
    for a, b in zip(old.criterion.queue.buffers(), new.criterion.queue.buffers(), strict=True):
        assert torch.equal(a, b)
    assert (new.criterion.queue.identities[:8] // 3 == rank).all()


def worker(rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    folder = str(Path(store).parent)
    by_pytorch(folder, rank)
    by_pytorch_in_shards(folder, rank)
    dist.destroy_process_group()


def test_torch_distributed_checkpoint(tmp_path):
    by_pytorch(str(tmp_path))


def test_torch_distributed_checkpoint_of_two_processes():
    together(worker, 2)
