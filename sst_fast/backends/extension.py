"""The compiled extension ``sst_fast._C``, or why there is none. Importing it registers the operators ``torch.ops.sst_fast``."""

from __future__ import annotations

import warnings
from types import ModuleType

compiled: ModuleType | None
why_not_compiled = ""
try:
    from sst_fast import _C as compiled  # type: ignore[attr-defined,no-redef]
except ImportError as error:
    compiled = None
    why_not_compiled = f"the extension sst_fast._C cannot be imported ({error})"
    warnings.warn(f"sst_fast: {why_not_compiled}; plain PyTorch serves instead, slower", RuntimeWarning, stacklevel=3)
