"""The compiled extension ``sst_fast._C``, or why there is none. Importing it registers the operators ``torch.ops.sst_fast``."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

REBUILD = "pip install --no-build-isolation --no-deps --force-reinstall"
compiled: ModuleType | None
why_not_compiled = ""


def explain(error: ImportError, package: Path, search: list[str]) -> str:
    """What the failed import of the extension means and what to do, in one or two sentences.

    Args:
        error: what the import raised.
        package: the folder of the package that was imported.
        search: where Python looks for packages (``sys.path``).
    """
    built = [file.name for file in package.glob("_C.*") if file.suffix in (".so", ".pyd")]
    if any(name == f"_C{suffix}" for name in built for suffix in EXTENSION_SUFFIXES):
        if "undefined symbol" in str(error) or "cannot open shared object file" in str(error):
            return (
                f"the extension sst_fast._C was built for another PyTorch than the one here ({torch.__version__}). "
                f"Build it again: {REBUILD} sst-fast"
            )
        return f"the extension sst_fast._C cannot be imported ({error})"
    if built:
        return (
            f"the extension sst_fast._C was built for another Python ({built[0]}) than this one "
            f"({sys.implementation.cache_tag}). Build it again: {REBUILD} sst-fast"
        )
    if (package.parent / "csrc").is_dir():
        others = [Path(folder) / package.name for folder in search if folder]
        hidden = [folder for folder in others if folder.resolve() != package.resolve() and any(folder.glob("_C.*"))]
        found = f", and it hides the one installed in {hidden[0].parent}" if hidden else ""
        return (
            f"this is the source folder {package.parent}, where the extension sst_fast._C has not been built{found}. "
            + ("Start Python in another folder, or build" if hidden else "Build")
            + " it here: pip install --no-build-isolation -e ."
        )
    return (
        "the package was installed without its extension sst_fast._C, because there was no C++ compiler or it failed. "
        f"With one (g++ 10 or newer), SST_FAST_REQUIRE_EXTENSION=1 {REBUILD} sst-fast builds it or says what is wrong"
    )


try:
    from sst_fast import _C as compiled  # type: ignore[attr-defined,no-redef]
except ImportError as error:
    compiled = None
    why_not_compiled = explain(error, Path(__file__).parent.parent, sys.path)
    warnings.warn(f"sst_fast: plain PyTorch serves, slower: {why_not_compiled}", RuntimeWarning, stacklevel=3)


def operator(name: str) -> Callable[..., Any]:
    """The operator ``sst_fast::<name>`` as a function of all its arguments, by the way that costs the host least.

    torch.compile traces ``torch.ops`` alone. Otherwise the extension's own function, where there is one, reads the arguments,
    which takes a fraction of the time that the general way needs.
    """
    if compiled is None:
        return lambda *_: None  # never called: no backend that needs the extension is chosen
    traced = getattr(torch.ops.sst_fast, name).default
    direct = getattr(compiled, name, traced)

    def call(*arguments: Any) -> Any:
        return (traced if torch.compiler.is_compiling() else direct)(*arguments)

    return call
