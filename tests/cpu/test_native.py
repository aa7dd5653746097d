"""The CPU kernels in a program of their own: under the address and undefined-behaviour sanitizers, as NEON, and as the
AVX-512 target on a processor without it."""

from __future__ import annotations

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jlebm_fast.backends import _native

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [  # what takes longest to compile first
    *(f"csrc/cpu/{name}.cpp" for name in
      ("mlp_langevin_chain", "mlp_energy_grad", "mlp_energy_layers", "langevin_noise", "langevin_step",
       "mlp_activation", "mlp_weight_grads", "spectral_norm", "interrupt", "threads")),
    "tests/cpu/native_check.cpp",
]  # fmt: skip
FLAGS = ["-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-I", "csrc", "-pthread"]
SANITIZED = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# with vectors of more than four lanes the last few chains have a layout of their own
WIDER = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"],
}


def build_and_run(compiler, extra, program, runner=()):
    if shutil.which(compiler) is None or any(shutil.which(name) is None for name in runner):
        pytest.skip(f"needs {' and '.join((compiler, *runner))}")
    objects = [program.with_suffix(f".{number}.o") for number in range(len(SOURCES))]
    with ThreadPoolExecutor(2) as pool:  # two compilers side by side
        commands = [
            [compiler, *FLAGS, *extra, "-c", source, "-o", str(target)]
            for source, target in zip(SOURCES, objects, strict=True)
        ]
        list(pool.map(lambda command: subprocess.run(command, cwd=ROOT, check=True), commands))
    subprocess.run([compiler, *FLAGS, *extra, *map(str, objects), "-o", str(program), "-ldl"], cwd=ROOT, check=True)
    ran = subprocess.run([*runner, str(program)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "all equal" in ran.stdout


@pytest.mark.parametrize("target", WIDER)
def test_under_the_sanitizers(tmp_path, target):
    if platform.machine() != "x86_64" and target != "baseline":
        pytest.skip(f"{target} is one of x86_64")
    if _native.unavailable_reason() is None and target not in _native.load().cpu_targets().split(", "):
        pytest.skip(f"this processor does not run {target}")
    build_and_run("c++", [*SANITIZED, *WIDER[target], f"-DJLEBM_TARGET={target}"], tmp_path / "sanitized")


def test_avx512_on_a_processor_without_it(tmp_path):
    if platform.machine() != "x86_64" or _native.unavailable_reason() is not None:
        pytest.skip("needs the compiled module on x86_64")
    targets = _native.load().cpu_targets().split(", ")
    if "avx2" not in targets or "avx512" in targets:
        pytest.skip("needs a processor with AVX2, and without AVX-512")
    emulated = ["-mavx2", "-mfma", "-include", "tests/cpu/avx512_emulated.h", "-DJLEBM_TARGET=avx512"]
    # not optimised: the compiler takes long enough over vectors that no register holds
    build_and_run("c++", ["-O0", "-Wno-psabi", *emulated], tmp_path / "emulated")


def test_neon_by_the_same_source(tmp_path):
    build_and_run(
        "aarch64-linux-gnu-g++",
        ["-O2", "-static", "-DJLEBM_TARGET=baseline"],
        tmp_path / "neon",
        runner=["qemu-aarch64"],
    )
