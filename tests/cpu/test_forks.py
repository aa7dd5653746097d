"""A child process that was forked has only the thread that forked it: chains go on, with threads of their own."""

import os
import subprocess
import sys

import pytest

from jlebm_fast.backends import _native

pytestmark = [
    pytest.mark.skipif(_native.unavailable_reason() is not None, reason=str(_native.unavailable_reason())),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
]

FORKED = """
import os, signal, torch
import jlebm_fast as jf
from jlebm_fast.backends import cpu

torch.set_num_threads(2)
sampler = jf.FastLangevin(jf.EnergyMLP(6, 20, 2), n_steps=20)
z = torch.randn(500, 6)
if {torch_too}:
    torch.ones(2_000_000).exp()  # in all threads of torch's own
before = sampler.sample(z, noise_key=3) if {parent_samples} else None
child = os.fork()
if child == 0:
    signal.alarm(60)  # a child that waits for ever is killed, and its status says so
    after = sampler.sample(z, noise_key=3)
    again = sampler.sample(z, noise_key=3)
    kept = torch.equal(after, again) and (before is None or torch.equal(after, before))
    os._exit(0 if kept else 3)
_, status = os.waitpid(child, 0)
# the parent goes on as before
assert before is None or torch.equal(sampler.sample(z, noise_key=3), before)
print(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.parametrize("parent_samples", [True, False])
@pytest.mark.parametrize("torch_too", [True, False])
def test_a_forked_child_samples(parent_samples, torch_too):
    source = FORKED.format(parent_samples=parent_samples, torch_too=torch_too)
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0"
