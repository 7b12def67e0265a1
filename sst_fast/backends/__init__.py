"""Who computes: one module a backend, and :mod:`sst_fast.backends.choose`, which picks one."""
