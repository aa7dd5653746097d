"""A long chain on the CPU heeds signals: Ctrl-C ends it at once, and a handler that returns changes nothing."""

import signal
import subprocess
import sys
import time

import pytest

from jlebm_fast.backends import _native

pytestmark = [
    pytest.mark.skipif(_native.unavailable_reason() is not None, reason="needs the compiled module"),
    pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX signals"),
]

# in a process of its own: handlers are those of the main thread
PROGRAM = """
import signal, sys, threading
import torch
import jlebm_fast as jf

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background process would ignore it
torch.set_num_threads({threads})
torch.manual_seed(0)
layers = [torch.randn({chains}, 6), torch.randn({chains}, 10)]
z, f = torch.cat(layers, 1), jf.EnergyMLP([6, 10], hidden=50, depth=2)
strided = z[:, :8].t().contiguous().t()  # no plain call takes it
mask = torch.zeros({chains}, 16, dtype=torch.bool)
"""
# the ways to the kernel: the usual call, layers, with records, with more than the usual call takes, and strided tensors
CALLS = {
    "usual": "jf.FastLangevin(f, n_steps=N).sample(z, noise_key=1)",
    "layers": "jf.FastLangevin(f, n_steps=N).sample(layers, noise_key=1)",
    "records": "jf.FastLangevin(f, n_steps=N).sample(z, noise_key=1, return_info=True, thin=1000)",
    "mask": "jf.FastLangevin(f, n_steps=N).sample(z, noise_key=1, mask=mask)",
    "strided": "jf.FastLangevin(jf.EnergyMLP(8, 50, 2), n_steps=N).sample(strided, noise_key=1, mask=mask[:, :8])",
}


def run(body, call, *, threads=2, chains=100, n_steps=10**8):
    text = PROGRAM.format(threads=threads, chains=chains) + body.replace("CALL", CALLS[call]).replace(
        "N)", f"{n_steps})"
    )
    return subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


CTRL_C = """
print("begins", flush=True)
CALL
print("ran on", flush=True)
"""


@pytest.mark.parametrize(
    ("call", "threads", "chains"),
    [*((call, 2, 100) for call in CALLS), ("usual", 2, 20_000), ("records", 1, 20_000)],
)
def test_ctrl_c_ends_a_chain(call, threads, chains):
    with run(CTRL_C, call, threads=threads, chains=chains, n_steps=10**8 if chains < 1000 else 10**5) as process:
        assert process.stdout.readline() == "begins\n"
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        try:
            out, err = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert "KeyboardInterrupt" in err, err
    assert "ran on" not in out
    assert time.monotonic() - began < 30  # a busy machine; the chain itself would take an hour


HANDLED = """
small = jf.FastLangevin(f, n_steps=9)
expected, seen = small.sample(z[:40], noise_key=3), []

def handler(*_):  # a chain amid a chain, on the same thread
    seen.append(torch.equal(small.sample(z[:40], noise_key=3), expected))
    if {raises} and len(seen) == 2:
        raise TimeoutError("long enough")

undisturbed = CALL if not {raises} else None
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.25, 0.25)
try:
    end = CALL
except TimeoutError as error:
    print("gave up:", error)
signal.setitimer(signal.ITIMER_REAL, 0)
if undisturbed is not None:
    print("equal:", torch.equal(end, undisturbed), len(seen) > 0)
print("chains amid:", all(seen), "and after:", torch.equal(small.sample(z[:40], noise_key=3), expected))
"""


@pytest.mark.parametrize("call", ["usual", "mask"])
def test_a_handler_that_returns_changes_nothing(call):
    out, err = run(HANDLED.replace("{raises}", "False"), call, n_steps=100_000).communicate(timeout=300)
    assert "equal: True True" in out, out + err
    assert "chains amid: True and after: True" in out


@pytest.mark.parametrize("call", ["usual", "mask"])
def test_what_a_handler_raises_is_the_callers(call):
    out, err = run(HANDLED.replace("{raises}", "True"), call).communicate(timeout=300)
    assert "gave up: long enough" in out, out + err
    assert "chains amid: True and after: True" in out


OTHER_THREAD = """
undisturbed = CALL
seen, ends = [], []
signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
thread = threading.Thread(target=lambda: ends.append(CALL))
signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
thread.start()
thread.join()
signal.setitimer(signal.ITIMER_REAL, 0)
print("equal:", torch.equal(ends[0], undisturbed), len(seen) > 0)
"""


def test_chains_of_other_threads_go_on():
    out, err = run(OTHER_THREAD, "usual", n_steps=50_000).communicate(timeout=300)
    assert "equal: True True" in out, out + err


SELDOM = """
import time
asked = []
signal.signal(signal.SIGALRM, lambda *_: asked.append(time.monotonic()))
begin = time.monotonic()
signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
CALL
signal.setitimer(signal.ITIMER_REAL, 0)
end = time.monotonic()
print(max(b - a for a, b in zip([begin, *asked], [*asked, end])) / (end - begin))
"""


def test_who_is_done_first_goes_on_asking():
    # 17 chains are two blocks of very different cost, and each a worker's
    out, err = run(SELDOM, "usual", chains=17, n_steps=600_000).communicate(timeout=300)
    assert float(out) < 0.5, out + err
