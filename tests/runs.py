"""Small training runs for tests, in this process or in others."""

import multiprocessing
import os
import signal
import socket
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from sst_fast.semi_siamese import GalleryPass
from sst_fast.train.config import Config, DataConfig


def make_faces(root, people=12):
    """People with three images each: a fixed noise pattern a person, and a little more an image."""
    from PIL import Image  # what GPU tests do not need may be missing on a GPU machine

    rng = np.random.default_rng(0)
    for person in range(people):
        (root / f"p{person}").mkdir(parents=True)
        base = rng.integers(40, 200, (8, 8))
        for i in range(3):
            pixels = np.kron(base, np.ones((4, 4))) + rng.normal(0, 10, (32, 32))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / f"p{person}" / f"{i}.png")
    return root


def config(root, out, **changes) -> Config:
    base = Config(
        data=DataConfig(str(root), 32, 1, test_share=0.25), dim=16, width=0.125, queue_size=7, momentum=0.9,
        epochs=4, batch=3, lr=0.005, out=str(out), device="cpu",
    )  # fmt: skip
    return replace(base, **changes)


def options(root, out, **changes) -> list[str]:
    """Nearly the same for the command line."""
    settings = {"data.root": root, "data.size": 32, "data.channels": 1, "dim": 16, "width": 0.125, "queue_size": 7,
                "momentum": 0.9, "epochs": 60, "batch": 4, "lr": 0.005, "device": "cpu", "out": out} | changes  # fmt: skip
    return [f"--{name}={value}" for name, value in settings.items()]


def forkserver():
    """Makes processes by forking one that has imported everything already, which takes longer than what tests run in them."""
    context = multiprocessing.get_context("forkserver")
    # Optimizers, logs and FSDP2 import the second to fourth, late.
    modules = [
        "sst_fast.train.loop",
        "torch._dynamo",
        "torch.utils.tensorboard",
        "torch.distributed.fsdp",
        "sst_fast.train.demo",
        "sst_fast.evaluation",
        "jsonargparse",
        "pytest",
    ]
    context.set_forkserver_preload(modules)
    return context


class Command:
    """``sst-fast ...`` in a process of its own. start_method: of the processes that it starts, by default Python's."""

    def __init__(self, arguments, errors: Path, environment=None, start_method=None) -> None:
        self.errors = errors
        self.process = forkserver().Process(
            target=_run, args=(list(arguments), errors, environment or {}, start_method)
        )
        self.process.start()

    def poll(self):
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def wait(self):
        self.process.join(120)
        return self.process.exitcode

    def told(self) -> str:
        return self.errors.read_text()


def _run(arguments, errors, environment, start_method):
    import sys

    import torch

    os.environ.update(environment)
    if start_method:
        multiprocessing.set_start_method(start_method, force=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    with errors.open("w") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = os.fdopen(2, "w")
    torch.set_num_threads(1)
    from sst_fast.train.cli import main

    sys.exit(main(arguments))


def ranks(arguments, errors: Path, count: int):
    """The same as so many processes, with what torchrun tells each of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}  # fmt: skip
    return [
        Command(arguments, errors.with_suffix(f".{rank}"), told | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]


def gallery_features(model, images):
    """Of one image each, as a training step takes them."""
    begun = GalleryPass(model.gallery, images, model.shuffle, model.criterion.group)
    begun.run()
    return begun.features


def _rank(rank, world, store, checks) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    for check in checks:
        check(rank, world)
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(world, *checks) -> None:
    """``check(rank, world)`` for each of them, in ``world`` processes of one gloo group."""
    together(_rank, world, checks)


def together(worker, world, *arguments) -> None:
    """``worker(rank, world, file for the group, *arguments)`` in ``world`` processes; their errors are raised here."""
    import torch.multiprocessing as mp

    forkserver()
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            worker, (world, str(Path(folder) / "store"), *arguments), nprocs=world, start_method="forkserver"
        )
