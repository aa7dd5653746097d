"""Tests with `chip` run the CUDA kernels on a device, or (JLEBM_GPU_DRY_RUN=1) rehearse on their host build."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from jlebm_fast import backends
from jlebm_fast.backends import cuda

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cuda"))

DRY_RUN = os.environ.get("JLEBM_GPU_DRY_RUN") == "1"


class Chip(NamedTuple):
    kernels: object  # the operations of backends/cuda.py
    device: torch.device
    rehearsal: bool

    def scaled(self, size: int) -> int:
        """A size for a GPU, or a tiny one for the rehearsal."""
        return min(size, 40) if self.rehearsal else size


def pytest_collection_modifyitems(items):
    reason = None if DRY_RUN else backends.unavailable_reason("cuda")
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if reason is not None and {"chip", "device_only"} & set(item.fixturenames):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def chip() -> Chip:
    if DRY_RUN:
        from host_build import on_host

        return Chip(on_host(), torch.device("cpu"), True)
    return Chip(cuda, torch.device("cuda", 0), False)


@pytest.fixture
def device_only(chip) -> None:
    if chip.rehearsal:
        pytest.skip("needs a device: streams and graphs are not rehearsed")
