"""The CPU kernels in a program of their own: under the address and undefined-behaviour sanitizers, and as NEON."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    "tests/cpu/native_check.cpp",
    *(f"csrc/cpu/{name}.cpp" for name in
      ("langevin_noise", "langevin_step", "mlp_energy_grad", "mlp_langevin_chain", "mlp_activation", "threads")),
]  # fmt: skip
FLAGS = ["-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-DJLEBM_TARGET=baseline", "-I", "csrc", "-pthread"]


def build_and_run(compiler, extra, program, runner=()):
    if shutil.which(compiler) is None or any(shutil.which(name) is None for name in runner):
        pytest.skip(f"needs {' and '.join((compiler, *runner))}")
    subprocess.run([compiler, *FLAGS, *extra, *SOURCES, "-o", str(program), "-ldl"], cwd=ROOT, check=True)
    ran = subprocess.run([*runner, str(program)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "all equal" in ran.stdout


def test_under_the_sanitizers(tmp_path):
    build_and_run("c++", ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"], tmp_path / "sanitized")


def test_neon_by_the_same_source(tmp_path):
    build_and_run("aarch64-linux-gnu-g++", ["-O2", "-static"], tmp_path / "neon", runner=["qemu-aarch64"])
