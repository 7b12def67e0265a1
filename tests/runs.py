"""Small training runs for tests."""

from dataclasses import replace

from sst_fast.train.config import Config, DataConfig


def config(root, out, **changes) -> Config:
    base = Config(
        data=DataConfig(str(root), 32, 1, test_share=0.25), dim=16, width=0.125, queue_size=7, momentum=0.9,
        epochs=4, batch=3, lr=0.05, out=str(out), device="cpu",
    )  # fmt: skip
    return replace(base, **changes)
