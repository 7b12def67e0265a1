"""Whether an installed sst-fast is whole: imports, data files, the compiled loss against plain PyTorch. Needs torch and NumPy
alone, no compiler and no checkout: ``python tests/smoke.py`` in another folder than a checkout's."""

from pathlib import Path

import torch

import sst_fast
from sst_fast.backends.extension import compiled

PACKAGE = Path(sst_fast.__file__).parent


def loss_and_gradient(backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    embedding = torch.randn(12, 16, requires_grad=True)
    prototypes = torch.nn.functional.normalize(torch.randn(64, 16))
    loss = sst_fast.functional.margin_softmax(
        embedding, prototypes, torch.arange(12), margin=sst_fast.AMSoftmax(0.35), backend=backend
    )
    loss.backward()
    assert embedding.grad is not None
    return loss.detach(), embedding.grad


def main() -> None:
    assert compiled is not None
    for ours, plain in zip(loss_and_gradient("cpu"), loss_and_gradient("reference"), strict=True):
        torch.testing.assert_close(ours, plain)
    for file in (
        "py.typed",
        "kernels/staged.py",
        "nn/compat",
        "data/lists.py",
        "evaluation/folds.py",
        "train/templates",
    ):
        assert (PACKAGE / file).exists(), f"{file} is missing in {PACKAGE}"
    print(f"sst-fast {sst_fast.__version__} with torch {torch.__version__} from {PACKAGE}: whole")


if __name__ == "__main__":
    main()
