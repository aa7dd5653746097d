"""Builds the CUDA kernels for the host, once for all test processes, and calls them on CPU tensors.

The module lies in build/cuda_host/; a file lock lets the first process build and the others wait.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pybind11
import pytest
import torch

from jlebm_fast import precision
from jlebm_fast.backends.cuda import Kernels

ROOT = Path(__file__).resolve().parents[2]
FLAGS = [
    "-std=c++17", "-O2", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-pthread",
    "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DJLEBM_CUDA_ON_HOST", "-I", str(ROOT / "csrc"),
]  # fmt: skip
# of an H100, whose choices the tests then see: (multiprocessors, shared memory of a block, warpgroups, clusters)
H100 = (132, 232448, True, True)
ANY_PLAN = (-1,) * 7


def kernel_sources() -> list[Path]:
    """All of csrc/cuda but the questions to the driver."""
    found = [p for p in (ROOT / "csrc/cuda").rglob("*") if p.suffix in {".cu", ".cpp"} and p.stem != "device_query"]
    return sorted(found)


def compiler() -> str:
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler named c++")
    return "c++"


def compile_objects(sources: list[Path], folder: Path, flags: list[str]) -> list[str]:
    """Objects of the sources, side by side."""

    def compiled(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        command = [compiler(), *flags, "-x", "c++", "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return str(target)

    with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(compiled, sources))


def digest(*parts: object) -> str:
    files = sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file() and p.parent.name != "cpu")
    state = hashlib.sha256(repr(parts).encode())
    for path in [*files, *sorted(Path(__file__).parent.glob("*.cpp"))]:
        state.update(path.name.encode() + path.read_bytes())
    return state.hexdigest()[:16]


@contextlib.contextmanager
def locked_folder(name: str) -> Iterator[Path]:
    """A folder under build/ that one process at a time works in."""
    folder = ROOT / "build" / "cuda_host" / name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


# of this process: what the compiler said to sources that do not compile, so that hundreds of tests hear it at once
refused: dict[str, str] = {}


def built(name: str, sources: list[Path], flags: list[str], link: list[str], target: str) -> Path:
    """`target`, linked from the sources once for this state of csrc/ and these flags."""
    key = f"{name}-{digest(flags, link)}"
    assert key not in refused, refused[key]
    with locked_folder(key) as folder:
        path = folder / target
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                try:
                    objects = compile_objects(sources, Path(scratch), flags)
                except AssertionError as error:
                    refused[key] = str(error)
                    raise
                fresh = Path(scratch) / target
                subprocess.run([compiler(), *flags, *objects, *link, "-o", str(fresh)], check=True)
                fresh.rename(path)
        return path


def build_module(name: str, more_flags: list[str]) -> Path:
    """The Python module `cuda_on_host`, with further flags of the compiler."""
    return built(name, module_sources(), [*FLAGS, *python_flags(), *more_flags], ["-shared"], module_file())


def module_sources() -> list[Path]:
    return [*kernel_sources(), ROOT / "csrc/bindings_cuda.cpp", Path(__file__).with_name("host_module.cpp")]


def python_flags() -> list[str]:
    return ["-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include()]


def module_file() -> str:
    return f"cuda_on_host{sysconfig.get_config_var('EXT_SUFFIX')}"


def load(path: Path | str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_on_host", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def host_module() -> ModuleType:
    """`cuda_on_host`: the functions cuda_* of jlebm_fast._C for CPU memory.

    JLEBM_TEST_PTX=1 in the environment takes what nvcc has made of each kernel (test_ptx_of_nvcc.py).
    """
    if os.environ.get("JLEBM_TEST_PTX") == "1":
        sys.path.append(str(ROOT / "tests/ptx"))
        import cuda_module

        return load(cuda_module.build_module())
    return load(build_module("module", []))


def launch_limits(limits: tuple) -> tuple[int, int, bool, bool]:
    """(multiprocessors, shared memory[, warpgroups[, clusters]]) -> all four; a chip without them where nothing is
    said."""
    return (*limits, False, False)[:4]


def on_host(order_seed: int = 0, limits: tuple = H100) -> Kernels:
    """The backend's operations on CPU tensors; `precision.using(…)` chooses the precision."""

    def launch(device: torch.device, workspace: torch.Tensor | None) -> tuple:
        place = (0, 0) if workspace is None else (workspace.data_ptr(), workspace.numel())
        return (0, order_seed, precision.NAMES.index(precision.current()), *place, *launch_limits(limits))

    module = host_module()
    module.want_plan(ANY_PLAN)  # an earlier test may have asked for a plan of its own
    return Kernels(module, launch)
