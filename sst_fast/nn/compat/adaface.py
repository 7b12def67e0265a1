"""AdaFace's head (mk-minchul/AdaFace, head.py)."""

from __future__ import annotations

from typing import Any

from sst_fast.nn import heads
from sst_fast.nn.compat import unit_uniform


def AdaFace(
    embedding_size: int = 512, classnum: int = 70722, m: float = 0.4, h: float = 0.333, s: float = 64.0,
    t_alpha: float = 1.0, *, clamps: bool = True, **options: Any,
) -> heads.AdaFace:  # fmt: skip
    """AdaFace; ``m`` is a number in [0, 1], ``s`` the scale.

    The head needs the norms of embeddings. Where the network gives unit embeddings and norms apart, call
    ``head(embeddings * norms, label)``.

    Args:
        clamps: hold cosines and angles a little inside their range, as in AdaFace's code (default). False: the formula as it is.
    """
    options = {"init": unit_uniform} | options
    return heads.AdaFace(classnum, embedding_size, m, h, s, t_alpha=t_alpha, clamps=clamps, **options)
