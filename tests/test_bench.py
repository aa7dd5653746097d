"""The benchmark measures what it says: published sizes, rivals that run the same chain, no number without parity."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time

import pytest
import torch
from torch import nn

from jlebm_fast import backends
from jlebm_fast.bench import machine, parity, report, rivals, sections, tables, timing, worker
from jlebm_fast.bench.cases import CASES, HS, LEBM, mlp_of
from jlebm_fast.bench.sections import sampler_of
from jlebm_fast.errors import RunError


@pytest.mark.parametrize(("name", "megaflop"), [("HS", 0.033), ("FID", 0.060), ("LEBM", 0.241), ("WIDE", 4.40)])
def test_arithmetic_is_the_published_workload(name, megaflop):
    assert CASES[name].flops(1) / CASES[name].n_steps / 1e6 == pytest.approx(megaflop, rel=0.02)


def test_spectrally_normalised_weights_have_norm_one():
    for weight in mlp_of(HS.network(), HS.spec).weights:
        assert torch.linalg.matrix_norm(weight.double(), 2) == pytest.approx(1.0, abs=1e-5)


def test_a_machine_without_git_is_described(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.describe()["commit"] is None


SHORT = dataclasses.replace(HS, n_steps=5)


@pytest.mark.parametrize("maker", [rivals.eager, rivals.eager_spectral], ids=["eager", "eager_spectral"])
def test_eager_rivals_run_the_chain(maker):
    network = SHORT.network()
    assert parity.rival(SHORT, network, "rival", maker(SHORT, network), 20).passed


def test_jax_runs_the_chain():
    pytest.importorskip("jax")
    network = SHORT.network()
    run = rivals.jax_scan(SHORT, network)
    assert parity.rival(SHORT, network, "jax", run, 20).passed
    z0 = SHORT.initial(20)
    assert not torch.equal(run(z0)[0], run(z0)[0])  # fresh noise in every call


def test_torchebm_runs_the_chain():
    pytest.importorskip("torchebm")
    network = SHORT.network()
    run = rivals.torchebm_sampler(SHORT, network)
    assert parity.rival(SHORT, network, "torchebm", run, 20).passed
    one_step = dataclasses.replace(SHORT, n_steps=1)
    run = rivals.torchebm_sampler(one_step, network)
    z0 = one_step.initial(2000)
    with_noise, without = (torch.cat(run(z0, scale), dim=1) for scale in (1.0, 0.0))
    std = (with_noise - without).std().item()  # of 32,000 normals: within 4 standard errors
    assert abs(std / one_step.step_size - 1) < 4 * (2 * 32_000) ** -0.5


@pytest.mark.parametrize("case", [SHORT, dataclasses.replace(LEBM, n_steps=5)], ids=["HS", "LEBM"])
def test_parity_accepts_the_oracle(case):
    network = case.network()
    assert parity.chain(case, network, sampler_of(case, network, "eager"), 150).passed


@pytest.mark.parametrize("wrong", ["weights", "step_size", "noise", "nan"])
def test_parity_refuses_a_wrong_chain(wrong):
    network = SHORT.network()
    sampler = sampler_of(SHORT, network, "eager")
    if wrong == "weights":
        with torch.no_grad():
            sampler.energy.layers[1].weight[3, 4] += 0.5
    elif wrong == "nan":
        with torch.no_grad():
            sampler.energy.layers[1].bias[0] = float("nan")
    elif wrong == "noise":
        sampler = dataclasses.replace(sampler, noise_scale=0.9)
    else:
        sampler = dataclasses.replace(sampler, step_size=0.39)
    assert not parity.chain(SHORT, network, sampler, 150).passed


def test_a_failed_parity_gives_no_number(monkeypatch):
    said = []
    contenders = sections.Contenders("chain", "mlp_langevin_chain", SHORT, 4, said.append)
    good = parity.Parity("mlp_langevin_chain", "good", True, 0.0, 0.0)
    bad = parity.Parity("mlp_langevin_chain", "bad", False, 1.0, 0.0)
    contenders.add("good", lambda: None, good)
    contenders.add("bad", lambda: None, bad)
    assert [record.contender for record in contenders.measure(rounds=3)] == ["good"]
    assert contenders.failed == [bad]
    assert "no number" in said[0]


def test_contenders_take_turns():
    order = []

    def slow(name):
        order.append(name)
        time.sleep(0.04)

    timings = timing.interleaved({"a": lambda: slow("a"), "b": lambda: slow("b")}, rounds=3)
    assert [len(t.seconds) for t in timings.values()] == [3, 3]
    assert "".join(order) == "aabb" + 3 * "aabb"  # a warm-up call before each timed one
    assert timings["a"].median == pytest.approx(0.04, abs=0.03)


def test_impatience_ends_the_rounds_but_not_before_the_third():
    timings = timing.interleaved({"a": lambda: time.sleep(0.04)}, rounds=50, patience=0.0)
    assert len(timings["a"].turns) == 3


def test_error_of_median_covers_the_median():
    """95 % intervals of the median of 31 values: 200 of them, of which 180 to 199 hold it (0.1 % on either side)."""
    generator = torch.Generator().manual_seed(3)
    held = 0
    for _ in range(200):
        values = (1 + 0.1 * torch.randn(31, generator=generator)).tolist()
        held += abs(statistics.median(values) - 1) <= tables.error_of_median(values)
    assert 180 <= held <= 199
    assert tables.error_of_median([1.0]) == math.inf


def test_ratios_hold_against_a_rival_with_the_threads_that_suit_it():
    def result(threads, seconds):
        chain = {"section": "chain", "op": "mlp_langevin_chain", "case": "HS", "chains": 100}
        records = [{**chain, "contender": name, "timing": {"median_s": s}} for name, s in seconds.items()]
        return {"threads": threads, "records": records}

    slower_with_more = result(1, {"cpu": 2.0, "jax.jit scan": 4.0, "eager loop": 9.0})
    all_threads = result(2, {"cpu": 1.0, "jax.jit scan": 6.0, "eager loop": 8.0})
    rows = dict(line.rsplit(maxsplit=1) for line in tables._ratios([slower_with_more, all_threads]).splitlines()[1:])
    assert rows == {
        "one batch: cpu, times faster than eager loop": "8.0",
        "one batch: cpu, times faster than jax.jit scan": "6.0",
        "one batch: cpu, times faster than jax.jit scan, threads that suit it": "4.0",
    }


def test_report_and_file(monkeypatch, tmp_path, capsys):
    """A whole small run in this process, with the oracle in the place of the kernels."""
    eager = backends.load("eager")
    monkeypatch.setitem(CASES, "HS", dataclasses.replace(HS, n_steps=3))
    monkeypatch.setattr(parity, "backends_with_kernels", lambda: [eager])
    monkeypatch.setattr(sections.peak, "fma_peak", lambda n_threads, seconds=0.3: 100.0)
    monkeypatch.setattr(sections.peak, "copy_rate", lambda seconds=0.3: 10.0)
    monkeypatch.setattr(timing, "_BURST_SECONDS", 0.0)
    monkeypatch.setattr(report, "MANY", 300)
    monkeypatch.setattr(tables, "MANY", 300)

    def measure(n, measurements):  # what is seen here shows in three rounds
        few = [{**one, "rounds": min(one["rounds"], 3)} for one in measurements]
        return worker.work({"threads": n, "measurements": few})

    monkeypatch.setattr(report, "_measure", measure)
    out = tmp_path / "folder" / "result.json"
    threads = torch.get_num_threads()
    try:
        assert report.main(report.BenchOptions(cases=("HS",), rivals=("eager",), threads=(1,), out=out)) == 0
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "Ratios" in printed
    assert "fraction of the FMA peak" in printed
    assert "Diagnostics" in printed
    stored = json.loads(out.read_text())
    assert {"cpu", "cores", "versions", "commit", "date"} <= set(stored["machine"])
    assert all(record["parity"]["passed"] for record in stored["results"][0]["records"])


@pytest.mark.parametrize("out", ["file/result.json", "folder"])
def test_a_file_that_cannot_be_written_is_refused_before_measuring(monkeypatch, tmp_path, out):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(parity, "backends_with_kernels", lambda: [backends.load("eager")])
    monkeypatch.setattr(report, "_measure", lambda *arguments: pytest.fail("it measures"))
    with pytest.raises(RunError, match=r"--out must be a file that can be written, got .*: name one"):
        report.main(report.BenchOptions(cases=("HS",), rivals=(), threads=(1,), out=tmp_path / out))


def test_trying_a_file_leaves_it_as_it_was(tmp_path):
    report.require_writable(tmp_path / "new" / "result.json")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "old.json").write_text("old")
    report.require_writable(tmp_path / "old.json")
    assert (tmp_path / "old.json").read_text() == "old"


def test_more_threads_than_cores_is_refused(capsys):
    assert report.main(report.BenchOptions(threads=(100_000,))) == 2
    assert "100000" in capsys.readouterr().out


def test_reference_is_autograd_of_the_network():
    """The independent reference agrees with a hand-written step."""
    network = nn.Sequential(nn.Linear(3, 1)).double()
    z = torch.ones(2, 3, dtype=torch.float64)
    stepped = parity._loop(network, z, None, 1, 0.4)
    assert torch.allclose(stepped, z + 0.08 * (network[0].weight - z))
