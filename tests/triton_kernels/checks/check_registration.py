"""opcheck of every operator, and operators beside functions, as in tests/test_registration.py, on this backend."""

from types import SimpleNamespace

import pytest
from test_registration import (
    test_keys_as_tensors,
    test_opcheck_of_energy_and_gradient,
    test_opcheck_of_step_and_noise,
    test_opcheck_of_the_chain,
    test_operators_are_the_functions,
)

__all__ = [
    "test_keys_as_tensors",
    "test_opcheck_of_energy_and_gradient",
    "test_opcheck_of_step_and_noise",
    "test_opcheck_of_the_chain",
    "test_operators_are_the_functions",
]


@pytest.fixture
def backend():
    return SimpleNamespace(name="triton", device="cpu")
