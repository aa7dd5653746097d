"""The benchmark of what surrounds the kernels: it runs, compares before it times, and reports what it says."""

import functools
import json
import sys

import pytest
import torch

from jlebm_fast import backends
from jlebm_fast.backends import _native
from jlebm_fast.bench import pytorch

pytestmark = pytest.mark.skipif(_native.unavailable_reason() is not None, reason=str(_native.unavailable_reason()))


def test_posterior_of_a_small_decoder():
    found = pytorch.posterior(turns=1, chains=3, width=2)
    assert found["deviation"] <= 1e-4
    assert set(found["seconds"]) == {"published loop", "FastLangevin"}
    assert found["times_faster"] > 0


def test_a_wrong_chain_is_not_timed(monkeypatch):
    right = pytorch.posterior_loop
    monkeypatch.setattr(pytorch, "posterior_loop", lambda *arguments: right(*arguments) + 0.01)
    with pytest.raises(RuntimeError, match="nothing is timed"):
        pytorch.posterior(turns=1, chains=3, width=2)


@pytest.mark.parametrize("what", ["forward", "parameters", "z"])
def test_energy(what):
    found = pytorch.energy("HS", 5, what, turns=2)
    assert found["turns"] == 2


def test_command_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(pytorch, "least_microseconds", lambda run, **_: (run(), 1.0)[1])
    few = functools.partial(pytorch.microseconds_in_turns, bursts=3, calls=1)
    monkeypatch.setattr(pytorch, "microseconds_in_turns", few)
    out = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["pytorch", "--only", "overhead", "sample", "--out", str(out)])
    threads = torch.get_num_threads()
    pytorch.main()
    torch.set_num_threads(threads)
    found = json.loads(out.read_text())
    assert found == json.loads(capsys.readouterr().out)
    assert [row["op"] for row in found["overhead"]] == list(backends.OPS)
    assert all(row["least"]["torch_add_us"] <= row["median"]["torch_add_us"] for row in found["overhead"])
    assert len(found["load"]) == 3
