"""Every kernel under Triton's interpreter, in processes of their own: it is chosen when Triton is imported.

The files checks/check_*.py are collected there and nowhere else.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

HERE = Path(__file__).parent
CHECKS = sorted(path.name for path in (HERE / "checks").glob("check_*.py"))


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment, cwd=HERE.parents[1]
    )


@pytest.fixture(scope="module", autouse=True)
def _interpreter():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: pip install triton")
    reason = "from jlebm_fast.backends import triton; print(triton.unavailable_reason() or '')"
    done = run("-c", reason)
    assert done.returncode == 0, done.stderr
    if "numpy" in done.stdout or "too old" in done.stdout:
        pytest.skip(f"{done.stdout.strip()} (numpy {numpy.__version__})")


def test_there_are_checks():
    assert len(CHECKS) >= 5


@pytest.mark.parametrize("name", CHECKS)
def test_interpreted(name):
    done = run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", str(HERE / "checks" / name))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    # all of them ran: a check that skips itself would say nothing
    last = done.stdout.splitlines()[-1]
    assert re.match(r"\d+ passed", last), last
    assert "skipped" not in last, last
