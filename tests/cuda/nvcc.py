"""The kernels' PTX, made by nvcc once for all test processes."""

from __future__ import annotations

import concurrent.futures
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from host_build import ROOT, digest, locked_folder

NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH: install the CUDA toolkit to run it")

CLUSTER = ROOT / "csrc/cuda/mlp_kernel_cluster.cu"
WARPGROUP = ROOT / "csrc/cuda/mlp_kernel_warpgroup.cu"


def side_by_side(commands: list[list[str]]) -> list[str]:
    """What each command prints on its error stream."""

    def one(command: list[str]) -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stderr

    with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(one, commands))


def kernel_files() -> list[Path]:
    """The files with kernels in them, but for the clusters', which compute_80 does not have."""
    sources = sorted(p for p in (ROOT / "csrc/cuda").glob("*.cu") if "JLEBM_KERNEL" in _whole_text(p))
    sources.remove(CLUSTER)
    return sources


def ptx_of(sources: list[Path], arch: str) -> list[Path]:
    """PTX of compute_`arch`, made by the first process that needs it."""
    with locked_folder(f"ptx-{digest(arch)}") as folder:
        targets = [folder / f"{source.stem}.ptx" for source in sources]
        missing = [(s, t) for s, t in zip(sources, targets, strict=True) if not t.exists()]
        common = [NVCC, "-std=c++17", "-O3", f"-arch=compute_{arch}", "-ptx", "-I", str(ROOT / "csrc")]
        side_by_side([[*common, str(source), "-o", f"{target}.part"] for source, target in missing])
        for _, target in missing:
            Path(f"{target}.part").rename(target)
    return targets


def report_on(ptx: list[Path], arch: str) -> str:
    """What the assembler says of each kernel on sm_`arch`: registers, stack, spills."""
    stems = "-".join(path.stem for path in ptx)
    with locked_folder(f"report-{digest(arch, stems)}") as folder:
        report = folder / "report.txt"
        if not report.exists():
            common = [NVCC, f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v"]
            commands = [[*common, str(path), "-o", str(folder / f"{path.stem}.cubin")] for path in ptx]
            report.write_text("".join(side_by_side(commands)))
        return report.read_text()


def _whole_text(source: Path) -> str:
    """A source and the kernel header that it instantiates."""
    text = source.read_text()
    headers = [ROOT / "csrc/cuda" / name for name in ("mlp_kernel.h", "mlp_warpgroup.h") if name in text]
    return text + "".join(header.read_text() for header in headers)
