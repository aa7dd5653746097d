"""The kernels' tests once more on what nvcc has made of them: its PTX, run instruction by instruction on the CPU
(tests/ptx). The host build proves the source; this also proves the half of chip.h that only nvcc reads, inline
assembly above all, and what the compiler has moved, merged and unrolled. Races between threads are looked for.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from host_build import compiler
from nvcc import needs_nvcc

HERE = Path(__file__).parent
FILES = [
    "test_cluster", "test_fused_energy", "test_host_operations", "test_mlp_energy_grad", "test_mlp_langevin_chain",
    "test_warpgroup",
]  # fmt: skip
# file, whether races are looked for, which tests; where 512 threads iterate for long, that would take minutes
LONG = "largest or order_of_threads"
RUNS = [(name, True, "") for name in FILES]
RUNS += [("test_spectral_norm", True, f"not ({LONG})"), ("test_spectral_norm", False, "largest")]
# of the source alone: barriers are left out of it, and the sanitizers have a build of their own
NOT_OF_PTX = "missing_barrier or sanitizers"


@needs_nvcc
@pytest.mark.parametrize(("name", "races", "which"), RUNS)
def test_compiled_kernels(name, races, which):
    compiler()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {"JLEBM_TEST_PTX": "1", "JLEBM_TEST_RACES": str(int(races)), "OMP_NUM_THREADS": "1"}
    chosen = f"not ({NOT_OF_PTX})" + (f" and ({which})" if which else "")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-k", chosen, str(HERE / f"{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.match(r"\d+ passed", done.stdout.splitlines()[-1]), done.stdout[-500:]
