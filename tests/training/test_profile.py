"""The profile of a training iteration: every part is there, and they add up to the whole."""

import importlib.util
import pathlib
import sys

import pytest

from jlebm_fast.bench.cases import Case

PATH = pathlib.Path(__file__).parents[2] / "benchmarks" / "profile_training.py"


def test_the_parts_of_an_iteration_add_up():
    spec = importlib.util.spec_from_file_location("profile_training", PATH)
    profile_training = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = profile_training  # dataclasses look their module up there
    spec.loader.exec_module(profile_training)
    case = Case("small", (2, 3), 8, 2, "leaky_relu", True, n_steps=3, step_size=0.4, batch=4)
    result = profile_training.profile(case, 16, 1, 4, rounds=1)
    for kind in ("eager loop", "native call"):
        parts = result[kind]["milliseconds"]
        assert parts["iteration"] == pytest.approx(sum(parts[part] for part in profile_training.PARTS))
        assert 0 < result[kind]["share_of_prior_chain"] < 1
    assert "| small, eager loop | small, native call |" in profile_training.table([result])
