"""Checks of the Triton kernels under the interpreter; run by tests/triton_kernels/test_interpreter.py."""

import sys
from pathlib import Path

import pytest
import torch

from jlebm_fast.backends import triton as backend

assert backend.unavailable_reason() is None, backend.unavailable_reason()
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]  # chains.py, reference.py


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
