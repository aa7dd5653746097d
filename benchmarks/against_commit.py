"""How fast the chains of this checkout are beside those of another commit of it: both in turns, in one run.

    python benchmarks/against_commit.py COMMIT [--cases HS FID LEBM] [--chains 100 10000] [--diagnostics]
                                        [--threads 1 2] [--turns 20] [--json FILE]

COMMIT's files go into a temporary folder and are built there, without CUDA; this checkout is timed as it stands, with
the compiled module it has. For each number of threads one process of either (against_commit_worker.py) waits for
requests. They take turns, the first of a turn being now the one, now the other, and each turn gives a ratio of two
medians that are a moment apart: a machine that is slower for a while is slower for both, so a change of a few per cent
shows where times alone differ by more from run to run. A row is the median time of either, and median and quartiles of
the ratios, this checkout by COMMIT: below 1 this checkout is the faster. HEAD as COMMIT shows how far ratios stray.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import pathlib
import shlex
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from jlebm_fast.bench import cases, machine
from jlebm_fast.errors import FAILURE, INTERRUPTED, USAGE_ERROR, RunError

ROOT = pathlib.Path(__file__).resolve().parents[1]
WORKER = pathlib.Path(__file__).with_name("against_commit_worker.py")
TURN_MS = 30.0  # a turn lasts at least about this long, so that short calls are not timed cold
WARM_MS = 1000.0  # calls longer than this need no untimed one before them


def main(arguments: list[str] | None = None) -> int:
    """Runs the comparison; 0 if every row was measured, 1 or 2 with a sentence why not."""
    options = parsed(arguments)
    cores = machine.usable_cores()
    if any(not 1 <= n <= cores for n in options.threads):
        given = " ".join(map(str, options.threads))
        say(f"--threads must be between 1 and {cores}, the cores this process may use, got {given}")
        return USAGE_ERROR
    try:
        compare(options)
    except RunError as error:
        say(str(error))
        return FAILURE
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    return 0


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("commit", metavar="COMMIT", help="whatever git takes for one: a hash, a tag, HEAD~3")
    parser.add_argument("--cases", nargs="+", default=["HS", "FID", "LEBM"], choices=cases.CASES)
    parser.add_argument("--chains", nargs="+", type=at_least(1), default=[100, 10_000])
    parser.add_argument("--diagnostics", action="store_true", help="time also calls that return diagnostics")
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, min(2, machine.usable_cores())}))
    parser.add_argument("--turns", type=at_least(2), default=20)  # quartiles need two
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the rows and every turn to it")
    return parser.parse_args(arguments)


def at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} on, got {text}")
        return int(text)

    return number


def compare(options: argparse.Namespace) -> None:
    if options.json and (options.json.is_dir() or not os.access(options.json.parent, os.W_OK)):
        raise RunError(f"--json must be a file that can be written, got {options.json}: name one in a folder of yours")
    commit = commit_of(options.commit)
    present = {"commit": commit_of("HEAD"), "uncommitted_changes": str(machine.commit()).endswith("+changes")}
    present["native_module_older_than_sources"] = older_than_sources(ROOT)
    if present["native_module_older_than_sources"]:
        say("the compiled module is older than csrc/: build it first if what changed there is to be timed")
    about = machine.describe()  # the date is that of the start
    with tempfile.TemporaryDirectory(prefix="against-commit-") as name:
        folder = pathlib.Path(name)
        say(f"building {commit[:12]}")
        write_files(commit, folder)
        build(commit, folder)
        other: dict[str, object] = {"commit": commit, "asked": options.commit}
        print(heading(about, present, commit), flush=True)
        rows = []
        for threads in options.threads:
            with Pair(folder, commit, threads) as pair:
                pair.require_same_cases(options.cases)
                present["compiler"], other["compiler"] = (hello["compiler"] for hello in pair.hello)
                for row in measured(pair, options):
                    rows.append({"threads": threads, **row})
                    print(line(rows[-1]), flush=True)
    if options.json:
        settings = {k: getattr(options, k) for k in ("cases", "chains", "diagnostics", "threads", "turns")}
        content = {"machine": about, "present": present, "other": other, "settings": settings, "rows": rows}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


# --- the other commit -------------------------------------------------------------------------------------------------


def commit_of(name: str) -> str:
    """The full hash of a commit of this checkout.

    Raises:
        RunError: this is no git checkout, or it has no such commit.
    """
    try:
        top = finished(["git", "-C", str(ROOT), "rev-parse", "--show-toplevel"])
    except FileNotFoundError:
        raise RunError("git is needed to have another commit's files: install it") from None
    if top.returncode or pathlib.Path(top.stdout.strip()).resolve() != ROOT:  # or unpacked in somebody else's checkout
        raise RunError(
            f"{ROOT} is not a git checkout, so there is no other commit to compare with: clone the repository"
        )
    asked = ["rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}"]
    found = finished(["git", "-C", str(ROOT), *asked])
    if found.returncode:
        raise RunError(
            f"COMMIT must be a commit of {ROOT}, got {name}: name one that `git log` shows, or fetch it first"
        )
    return found.stdout.strip()


def older_than_sources(checkout: pathlib.Path) -> bool:
    """Whether a source of what is timed, CUDA's left out, was written after the compiled module; False without one."""
    modules = [path.stat().st_mtime for path in (checkout / "jlebm_fast").glob("_C*.so")]
    sources = [checkout / "csrc", checkout / "csrc" / "cpu"]
    written = [path.stat().st_mtime for folder in sources for path in folder.iterdir() if path.is_file()]
    return bool(modules) and max(written) > max(modules)


def write_files(commit: str, folder: pathlib.Path) -> None:
    """The commit's files into folder/checkout, by an index of our own: nothing in the repository knows of it."""
    git = ["git", "-C", str(ROOT)]
    own_index = os.environ | {"GIT_INDEX_FILE": str(folder / "index")}
    for command in (["read-tree", commit], ["checkout-index", "--all", f"--prefix={folder / 'checkout'}/"]):
        done = finished([*git, *command], own_index)
        if done.returncode:
            raise RunError(f"the files of {commit[:12]} cannot be had: {told(done.stdout + done.stderr)}")


def build(commit: str, folder: pathlib.Path) -> None:
    """Builds folder/checkout as setup.py does, its module into its package.

    Raises:
        RunError: a tool is missing, or the build fails.
    """
    try:
        import pybind11
    except ImportError:
        raise RunError("pybind11 is needed to build the other commit: `pip install pybind11`") from None
    checkout, into = folder / "checkout", folder / "build"
    configure = [
        "cmake", "-S", str(checkout), "-B", str(into), "-G", "Ninja",
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={checkout / 'jlebm_fast'}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        "-DJLEBM_CUDA=off",
        *shlex.split(os.environ.get("CMAKE_ARGS", "")),
    ]  # fmt: skip
    # cmake and ninja installed beside this Python are found although its environment is not activated
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    # ninja itself, not `cmake --build`: told to stop, it stops its compilers and waits for them
    for command in (configure, ["ninja", "-C", str(into), "_C"]):
        try:
            done = finished(command, os.environ | {"PATH": path})
        except FileNotFoundError:
            raise RunError(f"{command[0]} is needed to build the other commit: `pip install {command[0]}`") from None
        if done.returncode:
            raise RunError(f"{commit[:12]} does not build here: {told(done.stdout + done.stderr)}")


def finished(command: list[str], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Runs a command to its end, or stops it if this one is interrupted."""
    child = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = child.communicate()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
            child.wait()
            for _ in range(500):  # what it has started may still write into the folder that is about to be removed
                os.killpg(child.pid, 0)
                time.sleep(0.02)
        raise
    return subprocess.CompletedProcess(command, child.returncode, output, errors)


def told(output: str) -> str:
    """What a failed command's output says in one line: the first with an error in it, else the last."""
    lines = [one.strip() for one in output.splitlines() if one.strip()] or ["it says nothing"]
    for i, one in enumerate(lines):
        if one.startswith("CMake Error at"):  # what it is comes below
            return textwrap.shorten(" ".join(lines[i : i + 6]), 240)
        if "error:" in one.lower():
            return one
    return lines[-1]


# --- the two in turns -------------------------------------------------------------------------------------------------


class Pair:
    """One process of this checkout and one of the other, with the same number of threads.

    hello    what each said when it was ready, the present one's first; so in every pair of values here
    """

    def __init__(self, folder: pathlib.Path, commit: str, threads: int) -> None:
        self.names = ("the present checkout", commit[:12])
        self.checkouts = (ROOT, folder / "checkout")
        self.said = tuple(folder / f"said-{i}" for i in range(2))
        self.threads = threads
        self.hello: list[dict] = []

    def __enter__(self) -> Pair:
        # Threads that wait asleep: OpenMP's spin for a while after each call, and would take the cores from the other
        # process, whose turn it is.
        environment = os.environ | {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(self.threads)}
        with contextlib.ExitStack() as stack:
            self.children = []
            for checkout, said in zip(self.checkouts, self.said, strict=True):
                child = subprocess.Popen(
                    [sys.executable, str(WORKER), str(checkout), str(self.threads)],
                    env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                    stderr=stack.enter_context(said.open("w")), text=True,
                    start_new_session=True,  # Ctrl-C is for the one that started it
                )  # fmt: skip
                stack.callback(ended, child)
                self.children.append(child)
            self.hello = [self.answer(i) for i in range(2)]
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def answer(self, i: int) -> dict | list[float]:
        text = self.children[i].stdout.readline()
        if not text:
            why = told(self.said[i].read_text())
            raise RunError(f"{self.names[i]} cannot be timed: {why}")
        return json.loads(text)

    def ask(self, i: int, **request: object) -> list[float]:
        with contextlib.suppress(BrokenPipeError):  # the answer says why
            self.children[i].stdin.write(json.dumps(request) + "\n")
            self.children[i].stdin.flush()
        return self.answer(i)

    def require_same_cases(self, names: list[str]) -> None:
        """Refuses problems that the other commit has not, or has with other sizes."""
        for name in names:
            here, there = (hello["cases"].get(name, {}) for hello in self.hello)
            if not there or any(here[key] != there[key] for key in here.keys() & there.keys()):
                raise RunError(
                    f"{self.names[1]} has no case {name} with the sizes it has here: leave it out of --cases"
                )


def ended(child: subprocess.Popen) -> None:
    child.kill()
    child.wait()
    for stream in (child.stdin, child.stdout):
        with contextlib.suppress(BrokenPipeError):
            stream.close()


def measured(pair: Pair, options: argparse.Namespace) -> Iterator[dict]:
    """One row for each problem, number of chains, and call without and with diagnostics, as they come."""
    for case in options.cases:
        for chains in options.chains:
            for diagnostics in (False, True)[: 1 + options.diagnostics]:
                what = {"case": case, "chains": chains, "diagnostics": diagnostics}
                # the first call allocates and is not timed
                slower = max(pair.ask(i, **what, untimed=1, calls=1)[0] for i in range(2))
                calls, untimed = max(1, math.ceil(TURN_MS / slower)), int(slower < WARM_MS)
                turns: tuple[list[float], list[float]] = ([], [])
                for turn in range(options.turns):
                    for i in (0, 1) if turn % 2 == 0 else (1, 0):
                        turns[i].append(statistics.median(pair.ask(i, **what, untimed=untimed, calls=calls)))
                kept = {"present_turns_ms": turns[0], "other_turns_ms": turns[1]}
                yield {**what, "calls_per_turn": calls, **summary(*turns), **kept}


def summary(present: list[float], other: list[float]) -> dict[str, float]:
    """Medians of both, and median and quartiles of the ratio of each turn, present by other."""
    ratios = [mine / theirs for mine, theirs in zip(present, other, strict=True)]
    lower, middle, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "present_median_ms": statistics.median(present),
        "other_median_ms": statistics.median(other),
        "ratio": middle,
        "ratio_lower_quartile": lower,
        "ratio_upper_quartile": upper,
    }


# --- what is printed --------------------------------------------------------------------------------------------------


def heading(about: dict, present: dict, commit: str) -> str:
    changes = " with changes" if present["uncommitted_changes"] else ""
    return (
        f"{about['cpu']}, {about['cores']} cores; present is {present['commit'][:12]}{changes}\n\n"
        f"| threads | case | chains | diagnostics | present, ms | {commit[:12]}, ms | present / other | quartiles |\n"
        "|---|---|---|---|---|---|---|---|"
    )


def line(row: dict) -> str:
    return (
        f"| {row['threads']} | {row['case']} | {row['chains']:,} | {'yes' if row['diagnostics'] else 'no'} "
        f"| {row['present_median_ms']:.3f} | {row['other_median_ms']:.3f} | {row['ratio']:.3f} "
        f"| {row['ratio_lower_quartile']:.3f} to {row['ratio_upper_quartile']:.3f} |"
    )


def say(sentence: str) -> None:
    print(f"against_commit: {sentence}", file=sys.stderr, flush=True)


def interrupted(*_: object) -> None:
    """As after Ctrl-C, once: a second one must not stop the first one's tidying up."""
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, interrupted)
    sys.exit(main())
