"""Checks of the Triton kernels without a GPU, in a process of their own: under the interpreter (TRITON_INTERPRET=1,
test_interpreter.py), or compiled for a chip and run on the CPU (JLEBM_TEST_PTX=sm_90, test_ptx_of_triton.py).
"""

import os
import sys
from pathlib import Path

import pytest
import torch

from jlebm_fast.backends import triton as backend

TESTS = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(TESTS), str(TESTS / "cuda")]  # chains.py, reference.py, mlp_host.py
CHIP = os.environ.get("JLEBM_TEST_PTX")

if CHIP is None:
    assert backend.unavailable_reason() is None, backend.unavailable_reason()


@pytest.fixture(autouse=True, scope="session")
def _chip():
    if CHIP is None:
        yield
        return
    sys.path.append(str(TESTS / "ptx"))
    import triton_calls

    with pytest.MonkeyPatch.context() as monkeypatch:
        triton_calls.use(monkeypatch, CHIP)
        yield


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """Outputs and scratch start as NaN: what a kernel leaves unwritten shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(tensor):
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(-77)

    monkeypatch.setattr(torch, "empty", lambda *args, **options: poisoned(empty(*args, **options)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: poisoned(empty_like(*args, **options)))
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *args, **o: poisoned(new_empty(self, *args, **o)))
