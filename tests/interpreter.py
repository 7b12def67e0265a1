"""What Triton's interpreter lacks, mended for tests. Import it before a kernel runs.

- It multiplies bfloat16 as bit patterns: operands of dot are widened to float32, which holds them exactly.
- Before 3.7 it makes numbers of arrays of one element, which NumPy refuses from 2.4 on.
- It patches the language again at every call of one kernel function by another, which takes half of its time.
- It looks for overflow at every operation on integers, which takes a fifth of its time; tests have too few elements for any.
- It makes a table of all dtypes whenever it asks for NumPy's name of one, which takes a sixth of its time.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _wide(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _mend():
    builder = interpreter.InterpreterBuilder
    dot, patch_tensor, call = (
        builder.create_dot,
        interpreter._patch_lang_tensor,
        interpreter.InterpretedFunction.__call__,
    )

    def create_dot(self, a, b, d, *rest):
        return dot(self, _wide(a), _wide(b), d, *rest)

    def patch_lang_tensor(tensor, *scope):
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    ask, known = interpreter._get_np_dtype, {}

    def get_np_dtype(dtype):
        scalar = dtype.scalar
        if isinstance(scalar, tl.pointer_type):
            return ask(scalar)
        if scalar not in known:
            known[scalar] = ask(scalar)
        return known[scalar]

    patched = set()  # modules of Triton's own functions: what they see stays patched

    def call_within(self, *args, **kwargs):
        module = self.fn.__module__
        done = module in patched or module.startswith("sst_fast.")  # ours: by the kernel that calls
        patched.add(module)
        return (self.rewrite() if done else partial(call, self))(*args, **kwargs)

    builder.create_dot = create_dot
    interpreter._get_np_dtype = get_np_dtype
    interpreter._patch_lang_tensor = patch_lang_tensor
    interpreter.InterpretedFunction.__call__ = call_within
    used = interpreter.interpreter_builder
    used.options = replace(used.options, sanitize_overflow=False)


_mend()
