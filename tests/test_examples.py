"""Every example trains on the embedded faces, and the loss falls."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from runs import together

from sst_fast import distributed

EXAMPLES = Path(__file__).parent.parent / "examples"


def falls(losses):
    assert losses[-1] < losses[0], losses


def worker(rank, world, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    from examples import ddp_partial_fc, fsdp2_sst

    head, losses = ddp_partial_fc.main(["--epochs", "4"])
    falls(losses)
    assert head.weight.shape == (20, 64)
    assert len(head.sampled) >= 10
    model, losses = fsdp2_sst.main(["--epochs", "4"])
    falls([distributed.mean(torch.tensor(loss)).item() for loss in losses])
    assert model.updates == 16
    distributed.assert_same(dict(model.criterion.queue.named_buffers()))
    dist.barrier()
    os._exit(
        0
    )  # FSDP2 keeps the group in caches of its own, and threads that outlive the interpreter may abort the process


@pytest.mark.slow
def test_several_processes():
    together(worker, 2)


def test_partial_fc_in_one_process():
    from examples import ddp_partial_fc

    head, losses = ddp_partial_fc.main(["--epochs", "4"])
    falls(losses)
    assert head.weight.shape == (40, 64)


def test_accelerate():
    pytest.importorskip("accelerate")
    from examples import accelerate_sst

    model, losses = accelerate_sst.main(["--epochs", "4", "--cpu"])
    falls(losses)
    assert model.updates == 16


def test_transformers_trainer(tmp_path):
    pytest.importorskip("transformers")
    from examples import transformers_trainer

    trainer = transformers_trainer.main(["--epochs", "4", "--out", str(tmp_path)])
    falls([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert trainer.state.global_step == 16


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.stem)
def test_examples_are_short(file):
    assert len(file.read_text().splitlines()) <= 80
