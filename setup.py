"""Builds sst_fast._C; everything else about the package is in pyproject.toml. Environment switches:

SST_FAST_FORCE_CUDA=1  build the CUDA sources or fail
SST_FAST_SKIP_CUDA=1   leave them out
SST_FAST_REQUIRE_EXTENSION=1  fail instead of installing without any extension
SST_FAST_SANITIZE=address,undefined  build for these sanitizers (make sanitize)
Otherwise the CUDA sources are built when torch is a CUDA build and nvcc is found. TORCH_CUDA_ARCH_LIST chooses architectures.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:  # older ones fail on pyproject.toml's licence, and do not say why
    raise SystemExit(
        f"sst-fast: building needs setuptools 77 or newer, this is {setuptools.__version__}; "
        "pip install --upgrade setuptools"
    )

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parent
CPU = sorted(str(p.relative_to(ROOT)) for folder in ("csrc", "csrc/cpu") for p in ROOT.glob(f"{folder}/*.cpp"))
CUDA = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cuda/*.cu"))
HEADERS = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.h"))
# sm_100 and sm_120 came with CUDA 12.8.
RECENT = tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2])) >= (12, 8)
ARCHITECTURES = "8.0;9.0a;10.0;12.0+PTX" if RECENT else "8.0+PTX;9.0a"
CXX_FLAGS = [
    "-O3",
    "-g0",
    "-std=c++20",
    "-ffp-contract=fast",
    "-DAT_PER_OPERATOR_HEADERS",  # without it PyTorch's headers declare every operator, which takes long to compile
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-unused-parameter",
]
# at::parallel_for is OpenMP in a header. It is compiled here but not linked: the symbols must be those of the libgomp that torch
# carries, or there would be two pools of threads. Clang's OpenMP speaks to another library; with it one thread serves.
if "clang" not in os.environ.get("CXX", ""):
    CXX_FLAGS.append("-fopenmp")
if sanitizers := os.environ.get("SST_FAST_SANITIZE"):
    CXX_FLAGS[:2] = ["-O1", "-g1"]
    CXX_FLAGS += [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined"]
NVCC_FLAGS = ["-O3", "-std=c++20", "--extended-lambda", "-Werror", "all-warnings", "-diag-suppress", "177,550"]


def switch(name: str) -> bool:
    return os.environ.get(name, "0").lower() not in ("", "0", "false", "no")


def find_toolkit() -> None:
    """Where nvcc is a wrapper outside its toolkit, asks it for the toolkit that holds libcudart."""
    home = cpp_extension.CUDA_HOME
    if home is None or any(Path(home).glob("lib*/libcudart.so")):
        return
    nvcc = Path(home) / "bin" / "nvcc"
    if nvcc.exists():
        said = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False).stderr
        for line in said.splitlines():
            if line.startswith("#$ TOP="):
                cpp_extension.CUDA_HOME = str(Path(line.removeprefix("#$ TOP=")).resolve())


def with_cuda() -> tuple[bool, str]:
    """Whether to build the CUDA sources, and the reason in words."""
    force, skip = switch("SST_FAST_FORCE_CUDA"), switch("SST_FAST_SKIP_CUDA")
    if force and skip:
        raise SystemExit("sst-fast: SST_FAST_FORCE_CUDA and SST_FAST_SKIP_CUDA are both set; set one")
    if skip:
        return False, "SST_FAST_SKIP_CUDA is set"
    find_toolkit()
    missing = None
    if torch.version.cuda is None:
        missing = f"torch {torch.__version__} is not a CUDA build"
    elif cpp_extension.CUDA_HOME is None or not (Path(cpp_extension.CUDA_HOME) / "bin" / "nvcc").exists():
        missing = "nvcc was not found (set CUDA_HOME)"
    if missing and force:
        raise SystemExit(f"sst-fast: SST_FAST_FORCE_CUDA is set, but {missing}")
    return (
        missing is None,
        missing or f"torch is built for CUDA {torch.version.cuda}, nvcc in {cpp_extension.CUDA_HOME}",
    )


def extension(cuda: bool) -> object:
    include = [str(ROOT / "csrc")]
    if not cuda:
        return cpp_extension.CppExtension(
            "sst_fast._C", CPU, include_dirs=include, depends=HEADERS, extra_compile_args={"cxx": CXX_FLAGS}
        )
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    return cpp_extension.CUDAExtension(
        "sst_fast._C",
        CPU + CUDA,
        include_dirs=include,
        depends=HEADERS,
        define_macros=[
            ("SST_FAST_CUDA", f'"{torch.version.cuda}"'),
            ("SST_FAST_SM90A", str(int("9.0a" in os.environ["TORCH_CUDA_ARCH_LIST"]))),
        ],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
    )


class BuildExtension(cpp_extension.BuildExtension):
    """Falls back from CUDA to C++ alone, and from C++ to no extension: the package works without, only slower."""

    def run(self) -> None:
        force = switch("SST_FAST_FORCE_CUDA")
        print(f"sst-fast: building C++ {'and CUDA' if CUDA_WANTED else 'only'}: {REASON}", flush=True)
        try:
            super().run()
            return
        except Exception as error:
            if force or (not CUDA_WANTED and switch("SST_FAST_REQUIRE_EXTENSION")):
                raise
            print(f"sst-fast: {error}", flush=True)
        if CUDA_WANTED:
            print("sst-fast: building the CUDA sources failed; building C++ only", flush=True)
            vars(self.extensions[0]).update(
                {name: value for name, value in vars(extension(False)).items() if not name.startswith("_") and value}
                | {"define_macros": [], "sources": CPU}
            )
            try:
                super().run()
                return
            except Exception as error:
                if switch("SST_FAST_REQUIRE_EXTENSION"):
                    raise
                print(f"sst-fast: {error}", flush=True)
        # Without a file to install, the remaining build steps must not look for one.
        self.extensions.clear()
        print("sst-fast: no extension was built; plain PyTorch will serve, slower", flush=True)


CUDA_WANTED, REASON = with_cuda()
setuptools.setup(ext_modules=[extension(CUDA_WANTED)], cmdclass={"build_ext": BuildExtension})
