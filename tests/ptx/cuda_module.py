"""`cuda_on_host` with nvcc's own PTX of each kernel in the place of its source: what the GPU's assembler is given."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import program
import translate
from host_build import (
    FLAGS,
    compile_objects,
    compiler,
    locked_folder,
    module_file,
    module_sources,
    python_flags,
    refused,
)
from nvcc import CLUSTER, WARPGROUP, kernel_files, ptx_of


def build_module() -> Path:
    key = "module of ptx"
    assert key not in refused, refused[key]
    try:
        return _built()
    except AssertionError as error:
        refused[key] = str(error)
        raise


def _built() -> Path:
    kernels = [kernel for path in _ptx() for kernel in translate.kernels(path.read_text())]
    with locked_folder(f"module-of-ptx-{program.machine_digest()}") as folder:
        target = folder / module_file()
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                texts = {f"ptx_{i}": kernel.source for i, kernel in enumerate(kernels)}
                objects = program.objects_of({**texts, "ptx_registry": _registry(kernels)}, Path(scratch))
                flags = [*FLAGS, *python_flags(), "-I", str(program.HERE)]
                objects += compile_objects([*module_sources(), program.RACES], Path(scratch), flags)
                fresh = Path(scratch) / "module.so"
                subprocess.run([compiler(), "-shared", "-pthread", *objects, "-o", str(fresh)], check=True)
                fresh.rename(target)
    return target


def _ptx() -> list[Path]:
    """Of the oldest chip that has each kernel's instructions."""
    common = [source for source in kernel_files() if source != WARPGROUP]
    return [*ptx_of(common, "80"), *ptx_of([CLUSTER], "90"), *ptx_of([WARPGROUP], "90a")]


def _registry(kernels: list[translate.Kernel]) -> str:
    """Names each kernel's stand-in when the module is loaded; both compilers mangle a kernel's name alike."""
    lines, calls = [], []
    for i, kernel in enumerate(kernels):
        lines.append(f'extern void kernel_{i}() asm("{kernel.name}");')
        lines.append(f'extern "C" void {kernel.function}(const void* const*);')
        calls.append(f"set_stand_in(reinterpret_cast<const void*>(&kernel_{i}), &{kernel.function});")
    return "\n".join([*lines, "const bool named = [] {", "using ptx::host::set_stand_in;", *calls, "return true; }();"])
