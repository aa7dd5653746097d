"""What the benchmark files share: parity before any number, and the arithmetic rate beside each time."""

from __future__ import annotations

import pytest

from jlebm_fast.bench import machine
from jlebm_fast.bench.parity import Parity


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["jlebm_fast"] = machine.describe()


@pytest.fixture
def passed_parity():
    """Ends the benchmark, without a number, if its operation computes something else than the reference."""

    def require(check: Parity) -> None:
        if not check.passed:
            pytest.fail(check.sentence(), pytrace=False)

    return require
