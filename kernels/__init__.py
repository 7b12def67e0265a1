"""Triton kernels, installed as ``sst_fast.kernels``."""
