"""Without a GPU, Triton's interpreter stands in for one; it must be chosen before triton is first imported."""

import os

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def faces(tmp_path):
    """Twelve people with three images each: a fixed noise pattern a person, and a little more an image."""
    from PIL import Image  # what GPU tests do not need may be missing on a GPU machine

    rng = np.random.default_rng(0)
    root = tmp_path / "faces"
    for person in range(12):
        (root / f"p{person}").mkdir(parents=True)
        base = rng.integers(40, 200, (8, 8))
        for i in range(3):
            pixels = np.kron(base, np.ones((4, 4))) + rng.normal(0, 10, (32, 32))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / f"p{person}" / f"{i}.png")
    return root
