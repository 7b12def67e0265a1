"""Losses as modules, by the names that the field knows them by: what replaces a head or a loss of another project."""

from sst_fast.nn.optimizers import RowAdamW, RowSGD
from sst_fast.nn.partial_fc import PartialFC, merge_state_dicts, split_state_dict

__all__ = [
    "PartialFC",
    "RowAdamW",
    "RowSGD",
    "merge_state_dicts",
    "split_state_dict",
]
