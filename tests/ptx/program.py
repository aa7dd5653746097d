"""PTX kernels on the CPU: translated to C++, compiled once for each text, called with host memory."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent / "cuda")]

import host_build  # noqa: E402
import translate  # noqa: E402
from host_build import ROOT, compile_objects, compiler, digest, locked_folder  # noqa: E402

# Half the time of -O1 to compile, and what runs is short.
FLAGS = [
    "-std=c++17", "-Og", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fwrapv", "-fvisibility=hidden", "-pthread",
    "-Wall", "-Werror", "-Wno-unused-label", "-Wno-unused-but-set-variable", "-Wno-unknown-pragmas",
    "-DJLEBM_CUDA_ON_HOST", "-I", str(ROOT / "csrc"), "-I", str(HERE),
]  # fmt: skip
RACES = HERE / "races.cpp"
_RUNTIME = [ROOT / "csrc/cuda/host" / f"{name}.cpp" for name in ("fibres", "block", "grid", "tensor_core")]
_ENTRY = """
{source}
extern "C" __attribute__((visibility("default"))) const char* run(
    const long long* shape, const void* const* parameters, unsigned long long order_seed) {{
    static thread_local std::string failure;
    jlebm::cuda::Geometry geometry;
    geometry.grid = shape[0], geometry.grid_y = shape[1], geometry.block = int(shape[2]);
    geometry.shared_bytes = shape[3];
    jlebm::cuda::CudaLaunch launch;
    launch.max_shared_bytes = int(shape[3]), launch.order_seed = order_seed;
    try {{
        host::run_grid({{"{name}", "PTX", 0}}, geometry, launch, [&] {{ {function}(parameters); }});
    }} catch (const std::exception& error) {{
        failure = error.what();
        return failure.c_str();
    }}
    return nullptr;
}}
"""


class Program:
    """The one kernel of a PTX text, to be called as often as one likes."""

    def __init__(self, ptx: str):
        (self.kernel,) = translate.kernels(ptx)
        self._run = ctypes.CDLL(str(_library(self.kernel))).run
        self._run.restype = ctypes.c_char_p

    def __call__(
        self, grid: Sequence[int], threads: int, shared_bytes: int, arguments: Sequence[object], order_seed: int = 0
    ) -> None:
        """Run all blocks; `arguments`: a ctypes value for each parameter, memory as addresses.

        Raises:
            RuntimeError: what csrc/cuda/host and machine.h report.
        """
        assert len(arguments) == len(self.kernel.parameters), (len(arguments), self.kernel.parameters)
        places = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        width, height, depth = (*grid, 1, 1)[:3]
        assert depth == 1, grid
        shape = (ctypes.c_longlong * 4)(width, height, threads, shared_bytes)
        failure = self._run(shape, places, ctypes.c_ulonglong(order_seed))
        if failure:
            raise RuntimeError(failure.decode())


def objects_of(texts: dict[str, str], folder: Path) -> list[str]:
    """Objects of translated sources, compiled side by side into `folder`; call it with the build's lock held."""
    header = _precompiled_header()
    sources = []
    for name, text in texts.items():
        sources.append(folder / f"{name}.cpp")
        sources[-1].write_text(text)
    return compile_objects(sources, folder, [*FLAGS, "-include", str(header)])


def machine_digest() -> str:
    """Of all that a translated kernel is compiled with."""
    parts = [path.read_bytes() for path in (*sorted(HERE.glob("*.h")), RACES, HERE / "translate.py")]
    return digest(FLAGS, parts)


def _precompiled_header() -> Path:
    with locked_folder(f"machine-{machine_digest()}") as folder:
        header, ready = folder / "all.h", folder / "all.h.gch"
        if not ready.exists():
            header.write_text('#include "machine.h"\n')
            made = folder / "part.gch"
            command = [compiler(), *FLAGS, "-x", "c++-header", str(header), "-o", str(made)]
            subprocess.run(command, check=True)
            made.rename(ready)
    return header


def _library(kernel: translate.Kernel) -> Path:
    text = _ENTRY.format(source=kernel.source, name=kernel.name, function=kernel.function)
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    with locked_folder(f"programs-{machine_digest()}-{key}") as folder:
        target = folder / "program.so"
        if not target.exists():
            runtime = _runtime()
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                objects = objects_of({"kernel": text}, Path(scratch))
                fresh = Path(scratch) / "program.so"
                link = [str(runtime), f"-Wl,-rpath,{runtime.parent}", "-o", str(fresh)]
                subprocess.run([compiler(), "-shared", *objects, *link], check=True)
                fresh.rename(target)
    return target


def _runtime() -> Path:
    """csrc/cuda/host as a library, which the programs of a process share."""
    flags = ["-fvisibility=default" if flag == "-fvisibility=hidden" else flag for flag in host_build.FLAGS]
    flags += ["-I", str(HERE)]
    return host_build.built(f"runtime-{machine_digest()}", [*_RUNTIME, RACES], flags, ["-shared"], "libptx_runtime.so")
