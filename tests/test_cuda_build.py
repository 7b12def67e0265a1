"""The machine code of the CUDA queue and of the loss on Hopper, wherever the extension was built with CUDA; no GPU needed."""

import functools
import re
import subprocess
from pathlib import Path

import pytest

from sst_fast.backends.extension import compiled

triton = pytest.importorskip("triton")  # its wheel carries cuobjdump
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
pytestmark = pytest.mark.skipif(
    compiled is None or compiled.cuda is None or not CUOBJDUMP.exists(), reason="the extension was built without CUDA"
)


@functools.cache
def dump(option):
    done = subprocess.run([CUOBJDUMP, option, compiled.__file__], capture_output=True, text=True, check=True)
    return done.stdout


def functions(option, name):
    parts = dump(option).split("Function : ")[1:]
    return [part for part in parts if re.match(name, part)]


def test_no_kernel_spills():
    text = dump("--dump-resource-usage")
    architectures = set(re.findall(r"arch = sm_(\d+)", text))
    kernels = re.findall(
        r"Function (\S*(?:enqueue|dequeue|window)_kernel\S*):\s+REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", text
    )
    # Enqueue and window: five dtypes of the rows, five of the queue, with wide and single accesses; and dequeue.
    assert len(kernels) == (2 * 5 * 5 * 2 + 1) * len(architectures)
    for name, registers, stack, local in kernels:
        assert (int(stack), int(local)) == (0, 0), name
        assert int(registers) <= 64, (
            f"{name}: {registers} registers leave fewer than four blocks of 256 to a multiprocessor"
        )


def test_the_machine_code():
    """One test of both, since taking the code out takes most of a minute."""
    wide_kernels_move_sixteen_bytes_at_once()
    if getattr(compiled, "sm90a", False):
        the_hopper_sweep_uses_what_hopper_has()


def wide_kernels_move_sixteen_bytes_at_once():
    parts = functions("-sass", r"\S*(enqueue|dequeue|window)_kernel")
    wide = [part for part in parts if re.match(r"\S*(enqueue|window)_kernel\S*Li(2|4|8|16)EE", part)]
    assert len(wide) == len(parts) * 50 // 101
    for part in wide:
        name = part.splitlines()[0]
        assert re.search(r"(LDG|STG)\.E\S*\.128", part), name
        assert not re.search(r"\b(LDL|STL)\b", part), name


def the_hopper_sweep_uses_what_hopper_has():
    kernels = functions("-sass", r"\S*sweep_kernel")
    whole = {}
    for part in kernels:
        name = part.splitlines()[0]
        if not re.search("[HQ]GMMA", part):  # another architecture: a trap
            assert len(re.findall(r"/\*[0-9a-f]{4}\*/", part)) < 40, name
            continue
        whole[name] = part
        assert not re.search(r"\b(LDL|STL)\b", part), f"{name} spills"
        dim, moment, of_bytes = int(re.search(r"Li(\d+)E", name)[1]), "Lb1E" in name, "Float8Products" in name
        # How many columns of cosines, and slots of the moment, one product adds up.
        product, depth = ("QGMMA", 32) if of_bytes else ("HGMMA", 16)
        cosines = len(re.findall(rf"\b{product}\.64x64x{depth}", part))
        wanted = 2 * 64 // depth if moment else 0  # for either tile
        width = dim // 2
        if of_bytes:  # no more columns at once than registers hold beside the float32 sums
            wanted, width = wanted * width // 64, 64
        if width == 64:  # as many as the cosines have
            assert cosines == dim // depth + wanted, name
        else:
            assert cosines == dim // depth, name
            assert len(re.findall(rf"\b{product}\.64x{width}x{depth}", part)) == wanted, name
        assert "UTMALDG.3D" in part, name
        assert ("UTMALDG.3D.MULTICAST" in part) == ("__nv_fp8" not in name), name
        assert "USETMAXREG" in part, name
        # Barriers of memory and discarded caches only where blocks of a cluster begin and end, and one for the weights.
        assert len(re.findall(r"\bMEMBAR\.\S*GPU", part)) <= 2, name
        assert len(re.findall(r"\bCCTL", part)) <= 2, name
    # Three dimensions and three dtypes, float8 products of two; four families of margins, with and without a gradient.
    assert len(whole) == (3 * 3 + 2) * 4 * 2
