"""Every kernel as Triton compiles it for a chip: its PTX, run instruction by instruction on the CPU (tests/ptx).

The interpreter proves the formulas; this proves what the compiler makes of them, layouts, barriers, asynchronous
copies and the tensor cores' instructions, and the chip's own exponentials and quotients, which are no exact ones. Races
between threads are looked for. The checks are the interpreter's, in processes of their own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import needs_compiler  # noqa: F401
import pytest

HERE = Path(__file__).parent
# Ampere's and Ada's instructions, and Hopper's
CHIPS = ("sm_80", "sm_90")
CHECKS = ["check_chains", "check_gradients", "check_noise", "check_packing", "check_products", "check_spectral",
          "check_step", "check_updates"]  # fmt: skip
# kernels that the checks have for themselves
NOT_OF_PTX = "philox or extreme_words"


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("name", CHECKS)
def test_compiled(name, chip):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "TRITON_"))}
    environment |= {"JLEBM_TEST_PTX": chip, "JLEBM_TEST_RACES": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-k", f"not ({NOT_OF_PTX})", str(HERE / "checks" / f"{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    last = done.stdout.splitlines()[-1]
    assert re.match(r"\d+ passed", last), last
    assert "skipped" not in last, last
