"""The machine code of the CUDA queue, wherever the extension was built with CUDA; no GPU needed."""

import re
import subprocess
from pathlib import Path

import pytest

from sst_fast import dispatch

compiled = dispatch.compiled
triton = pytest.importorskip("triton")  # its wheel carries cuobjdump
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
pytestmark = pytest.mark.skipif(
    compiled is None or compiled.cuda is None or not CUOBJDUMP.exists(), reason="the extension was built without CUDA"
)


def dump(option):
    done = subprocess.run([CUOBJDUMP, option, compiled.__file__], capture_output=True, text=True, check=True)
    return done.stdout


def test_no_kernel_spills():
    text = dump("--dump-resource-usage")
    architectures = set(re.findall(r"arch = sm_(\d+)", text))
    kernels = re.findall(r"Function (\S*(?:enqueue|dequeue)_kernel\S*):\s+REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", text)
    # Four dtypes of the batch, five of the queue, with wide and single accesses; and dequeue.
    assert len(kernels) == (4 * 5 * 2 + 1) * len(architectures)
    for name, registers, stack, local in kernels:
        assert (int(stack), int(local)) == (0, 0), name
        assert int(registers) <= 64, (
            f"{name}: {registers} registers leave fewer than four blocks of 256 to a multiprocessor"
        )


def test_wide_kernels_move_sixteen_bytes_at_once():
    parts = re.split(r"\s+Function : ", dump("-sass"))[1:]
    wide = [part for part in parts if re.match(r"\S*enqueue_kernel\S*Li(2|4|8|16)EE", part)]
    assert len(wide) == len(parts) * 20 // 41
    for part in wide:
        name = part.splitlines()[0]
        assert re.search(r"(LDG|STG)\.E\S*\.128", part), name
        assert not re.search(r"\b(LDL|STL)\b", part), name
