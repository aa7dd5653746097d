"""Two gloo ranks at one run: the same chains as one process, one writer, and an end for all when one ends."""

import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from ranked_run import KINDS, recorded_run
from shapes import TINY

from jlebm_fast.errors import RunError
from jlebm_fast.training.checkpoints import load_checkpoint
from jlebm_fast.training.distributed import rank_and_size, require_one_process
from jlebm_fast.training.run_folder import RunFolder

HERE = pathlib.Path(__file__).parent
PORTS = random.Random(os.getpid())  # others in every worker of a test run
QUIET = ["--no-figures", "--device", "cpu", *TINY]


def environment(**more):
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    paths = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **more}


def free_ports(n):
    """Below those that a system gives to outgoing connections: earlier runs make some, and would take a later one's."""
    ports = []
    for port in PORTS.sample(range(15_000, 32_000), 10 * n):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports.append(port)
    return ports[:n]


def start_two_ranks(commands, runs=3):
    """Processes of two ranks that find each other on ports of their own, one for each run they make."""
    ports = list(map(str, free_ports(runs)))
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ports[0], "PORTS": " ".join(ports), "WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **place),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]


def finished(processes):
    said = [process.communicate(timeout=100) for process in processes]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, out, err)
        for process, (out, err) in zip(processes, said, strict=True)
    ]


def two_ranks(commands):
    return finished(start_two_ranks(commands))


def jlebm_twice(*arguments, second=()):
    command = ["-m", "jlebm_fast", *arguments]
    return two_ranks([command, [*command, *second]])


def test_two_ranks_are_one_process_and_go_on_in_any_number(folder_of_shapes, tmp_path, jlebm):
    """One test, for its runs are the expensive part: spread over workers each of them would make its own."""
    (tmp_path / "two").mkdir()
    for process in two_ranks([[HERE / "ranked_run.py", tmp_path / "two", folder_of_shapes]] * 2):
        assert process.returncode == 0, process.stderr
    ranks = [torch.load(tmp_path / "two" / f"rank{r}.pt", weights_only=False) for r in range(2)]
    one = recorded_run(tmp_path / "one", folder_of_shapes)
    for kind in KINDS:
        assert_same_chains(one[kind], [rank[kind] for rank in ranks], kind)
        assert_same_learning(one[kind]["checkpoint"], ranks[0][kind]["checkpoint"])
        lines = [RunFolder(tmp_path / root / kind).read_metrics() for root in ("one", "two")]
        for a, b in zip(*lines, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert_every_model_learns_the_same(one["models"], *(rank["models"] for rank in ranks))
    assert_a_run_goes_on(RunFolder(tmp_path / "two" / "persistent"), jlebm)


def assert_same_chains(one, ranks, kind):
    """The union of the ranks' chains is the one-process run's, bit for bit."""
    for what in ("starts", "ends"):  # of the first step: after it the parameters differ in rounding
        assert len(ranks[0][what][0]) == 4
        assert torch.equal(torch.cat([rank[what][0] for rank in ranks]), one[what][0])
    if kind == "short-run":  # these start from noise at every step
        for i, whole in enumerate(one["starts"]):
            assert torch.equal(torch.cat([rank["starts"][i] for rank in ranks]), whole)


def assert_same_learning(expected, found):
    assert expected.keys() == found.keys()  # nothing tells how many ranks there were
    for name, parameter in expected["model"].items():
        # Six steps of Adam at 1e-3: far less than the 6e-3 that they can move a weight.
        torch.testing.assert_close(found["model"][name], parameter, rtol=0, atol=3e-4)
    if "replay" in expected:
        assert found["replay"].shape == expected["replay"].shape == (2, 8, 5)
        torch.testing.assert_close(found["replay"], expected["replay"], rtol=0, atol=1e-2)


def assert_every_model_learns_the_same(one, first, second):
    assert len(one) == 13
    for model, (metrics, state) in one.items():
        assert len(metrics) == len(first[model][0])
        for ours, theirs in zip(metrics, first[model][0], strict=True):
            assert theirs == pytest.approx(ours, rel=2e-3, abs=2e-3), model
        for name, value in state.items():
            assert torch.equal(first[model][1][name], second[model][1][name]), (model, name)  # ranks stay together
            torch.testing.assert_close(first[model][1][name], value, rtol=0, atol=1e-2, msg=f"{model} {name}")


def assert_a_run_goes_on(run, jlebm):
    """From two ranks to one, and to two again."""
    assert {p.name for p in run.path.iterdir()} == {"config.json", "metrics.jsonl", "checkpoint.safetensors"}
    alone = jlebm("train", run.path, "--resume", "--steps", "9", "--no-figures")
    assert alone.returncode == 0, alone.stderr
    assert load_checkpoint(run.checkpoint)["step"] == 9
    first, second = jlebm_twice("train", run.path, "--resume", "--steps", "12", "--no-figures")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert str(run.checkpoint) in first.stdout
    assert second.stdout == ""
    assert load_checkpoint(run.checkpoint)["step"] == 12
    assert [line["step"] for line in run.read_metrics()] == [4, 6, 8, 9, 12]


def test_ranks_that_differ_end_with_one_sentence(folder_of_shapes, tmp_path):
    first, second = jlebm_twice("train", tmp_path / "run", "--data", folder_of_shapes, *QUIET, second=["--width", "8"])
    assert (first.returncode, second.returncode) == (1, 1)
    assert first.stderr.count("\n") == 1
    assert "rank 1 sees --width = 8, rank 0 sees 4: start all ranks with the same options" in first.stderr
    assert second.stderr == ""
    assert not (tmp_path / "run").exists()


def test_a_rank_with_an_error_of_its_own_ends_all(folder_of_shapes, tmp_path):
    arguments = ["train", tmp_path / "run", "--data", folder_of_shapes, *QUIET, "--steps", "50"]
    first, second = jlebm_twice(*arguments, second=["--data", tmp_path / "nowhere"])
    assert (first.returncode, second.returncode) == (1, 1)
    assert "rank 1: no such file or folder" in first.stderr
    assert first.stderr.count("\n") == 1


def test_a_stop_asked_of_one_rank_stops_both_at_one_step(folder_of_shapes, tmp_path):
    run = RunFolder(tmp_path / "run")
    arguments = ["-m", "jlebm_fast", "train", run.path, "--data", folder_of_shapes, *QUIET, "--steps", "1000000"]
    processes = start_two_ranks([[*arguments, "--log-every", "1", "--checkpoint-every", "1000000"]] * 2)
    wait_until(lambda: run.metrics.exists() and run.metrics.read_bytes().count(b"\n") > 3)
    processes[1].send_signal(signal.SIGTERM)
    first, second = finished(processes)
    assert (first.returncode, second.returncode) == (143, 143)
    step = load_checkpoint(run.checkpoint)["step"]
    assert f"jlebm: stopped after step {step}; jlebm train {run.path} --resume goes on" in first.stderr
    assert second.stderr == ""
    assert run.read_metrics()[-1]["step"] == step > 3


def test_killing_a_rank_ends_the_others_and_loses_nothing(folder_of_shapes, tmp_path, jlebm):
    """Under torchrun, as users start it; the whole job must be over within a minute."""
    run = RunFolder(tmp_path / "run")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "jlebm_fast"]
    command += ["train", run.path, "--data", folder_of_shapes, *QUIET, "--steps", "1000000"]
    command += ["--log-every", "1", "--checkpoint-every", "5"]
    job = subprocess.Popen(list(map(str, command)), env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: run.metrics.exists() and run.metrics.read_bytes().count(b"\n") > 10)
        workers = pathlib.Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        assert len(workers) == 2
        killed_at = time.monotonic()
        os.kill(int(workers[1]), signal.SIGKILL)
        _, said = job.communicate(timeout=60)
        assert time.monotonic() - killed_at < 60
    finally:
        job.kill()
    assert job.returncode != 0
    assert "jlebm: rank 0 of 2 lost another rank, which ended or fell silent" in said
    assert "the last checkpoint is kept, --resume goes on with any number of ranks" in said
    step = load_checkpoint(run.checkpoint)["step"]
    assert step >= 5
    alone = jlebm("train", run.path, "--resume", "--steps", str(step + 3), "--no-figures")
    assert alone.returncode == 0, alone.stderr
    steps = [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()]
    assert steps == list(range(1, step + 4))


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


ENDS_AT_ONCE = """
import faulthandler, os, sys, torch
from jlebm_fast.training.distributed import joined_ranks

def run():
    with joined_ranks(torch.device("cpu")) as ranks:
        parameter = torch.nn.Parameter(torch.zeros(10))
        reducer = ranks.reducer([parameter])
        reducer(parameter.sum()).backward()
        for _ in range(3):
            ranks.gather(torch.ones(300, 10), dim=1)

faulthandler.dump_traceback_later(60, exit=True)
sys.setswitchinterval(30.0)  # threads that want Python's lock get it when this one waits, not in between
for os.environ["MASTER_PORT"] in os.environ["PORTS"].split():
    run()
"""


def test_ranks_part_right_after_a_collective():
    """The group must not be released while its threads still hold tensors of the last collective: a deadlock."""
    for process in finished(start_two_ranks([["-c", ENDS_AT_ONCE]] * 2, runs=40)):
        assert process.returncode == 0, process.stderr


def test_several_ranks_leave_without_waiting_for_each_other(monkeypatch):
    from jlebm_fast import cli

    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    monkeypatch.setattr(cli, "_run", lambda arguments: 0)
    assert cli.main(["train", "run"]) == 0
    assert left == []
    monkeypatch.setenv("WORLD_SIZE", "2")
    cli.main(["train", "run"])
    assert left == [0]


def test_a_half_set_environment_is_named(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match='RANK="" and WORLD_SIZE="2" in the environment are no place among ranks'):
        rank_and_size()
    monkeypatch.setenv("RANK", "1")
    assert rank_and_size() == (1, 2)
    with pytest.raises(RunError, match="jlebm evaluate runs in one process, 2 were started"):
        require_one_process("evaluate")
