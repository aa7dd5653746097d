"""The comparison with another commit: what it makes of its turns, and what it refuses before anything is built."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

PATH = pathlib.Path(__file__).parents[1] / "benchmarks" / "against_commit.py"


@pytest.fixture
def against_commit(monkeypatch, tmp_path):
    """The script as a module, which builds nothing and makes its temporary folders in an empty one."""
    monkeypatch.setattr(sys, "path", list(sys.path))  # it puts its checkout there
    spec = importlib.util.spec_from_file_location("against_commit", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "build", lambda *arguments: pytest.fail("it builds"))
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    return module


@pytest.fixture
def checkout(against_commit, monkeypatch, tmp_path_factory):
    """An empty folder, with one empty commit of git, in the place of the checkout."""
    root = tmp_path_factory.mktemp("checkout").resolve()
    monkeypatch.setattr(against_commit, "ROOT", root)
    # whatever the user has git do at every commit, sign it for one, is left out
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    author = {f"GIT_{who}_{what}": "a@b.c" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    try:
        for command in (["init", "--quiet"], ["commit", "--quiet", "--allow-empty", "--message=first"]):
            subprocess.run(["git", "-C", root, *command], env=os.environ | author, check=True)
    except FileNotFoundError:
        pytest.skip("needs git")
    return root


def test_ratios_are_those_of_each_turn(against_commit):
    """A machine that is ten times slower in one turn changes no ratio."""
    other = [1.0, 2.0, 10.0, 1.0, 2.0]
    speed = [0.9, 0.8, 1.1, 1.0, 0.7]
    found = against_commit.summary([ratio * ms for ratio, ms in zip(speed, other, strict=True)], other)
    assert found == pytest.approx(
        {
            "present_median_ms": 1.4,
            "other_median_ms": 2.0,
            "ratio": 0.9,
            "ratio_lower_quartile": 0.8,
            "ratio_upper_quartile": 1.0,
        }
    )


def test_the_first_of_a_turn_alternates(against_commit):
    asked = []

    class Pair:
        def ask(self, i, case, chains, diagnostics, untimed, calls):
            asked.append((i, diagnostics, untimed, calls))
            return [(8.0, 16.0)[i]] * calls

    arguments = ["HEAD", "--cases", "HS", "--chains", "7", "--turns", "3", "--diagnostics"]
    plain, full = against_commit.measured(Pair(), against_commit.parsed(arguments))
    assert [i for i, *_ in asked] == [0, 1, 0, 1, 1, 0, 0, 1] * 2
    assert {tuple(how) for _, *how in asked[2:8]} == {(False, 1, 2)}  # two calls fill a turn of the slower one
    assert (plain["diagnostics"], full["diagnostics"]) == (False, True)
    assert plain["present_turns_ms"] == [8.0] * 3
    assert plain["ratio"] == 0.5
    assert "| HS | 7 | no | 8.000 | 16.000 | 0.500 | 0.500 to 0.500 |" in against_commit.line({"threads": 1, **plain})


def refusal(against_commit, capsys, tmp_path, *arguments):
    """Exit code and what is said; nothing is printed as a result, nothing left behind."""
    code = against_commit.main(list(arguments))
    printed = capsys.readouterr()
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []
    assert printed.err.startswith("against_commit: ")
    assert printed.err.count("\n") == 1
    return code, printed.err


def test_more_threads_than_cores_are_refused(against_commit, capsys, tmp_path):
    code, sentence = refusal(against_commit, capsys, tmp_path, "HEAD", "--threads", "1", "100000")
    assert code == 2
    assert "--threads must be between 1 and" in sentence
    assert "got 1 100000" in sentence


@pytest.mark.parametrize("name", ["no-such-branch", "0123456789abcdef", "--all"])
def test_an_unknown_commit_is_refused(against_commit, checkout, capsys, tmp_path, name):
    code, sentence = refusal(against_commit, capsys, tmp_path, "--threads=1", "--", name)
    assert code == 1
    assert f"COMMIT must be a commit of {checkout}, got {name}: name one" in sentence


@pytest.mark.parametrize("where", ["nowhere", "inside another"])
def test_what_is_no_checkout_is_refused(against_commit, checkout, monkeypatch, capsys, tmp_path, where):
    root = checkout / "unpacked"
    root.mkdir()
    monkeypatch.setattr(against_commit, "ROOT", root)
    if where == "nowhere":
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(checkout))
    code, sentence = refusal(against_commit, capsys, tmp_path, "HEAD", "--threads=1")
    assert code == 1
    assert f"{root} is not a git checkout" in sentence


def test_a_file_that_cannot_be_written_is_refused(against_commit, capsys, tmp_path):
    missing = str(tmp_path / "missing" / "rows.json")
    code, sentence = refusal(against_commit, capsys, tmp_path, "HEAD", "--threads=1", "--json", missing)
    assert code == 1
    assert "--json must be a file that can be written" in sentence


def test_a_commit_that_does_not_build_is_refused(against_commit, checkout, monkeypatch, capsys, tmp_path):
    def build(commit, folder):
        assert (folder / "checkout").parent.parent == tmp_path
        raise against_commit.RunError("it does not build here: csrc/a.cpp:1: error: no")

    monkeypatch.setattr(against_commit, "build", build)
    monkeypatch.setattr(against_commit, "older_than_sources", lambda checkout: False)
    said = []
    monkeypatch.setattr(against_commit, "say", said.append)
    assert against_commit.main(["HEAD", "--threads=1"]) == 1
    assert said[1:] == ["it does not build here: csrc/a.cpp:1: error: no"]
    assert list(tmp_path.iterdir()) == []


def test_the_telling_line_of_a_failed_build(against_commit):
    assert against_commit.told("[1/2] a.o\na.cpp:3:1: error: 'x'\nb\nninja: build stopped\n") == "a.cpp:3:1: error: 'x'"
    found = against_commit.told(
        "-- C++\nCMake Error at CMakeLists.txt:3 (find_package):\n  No pybind11\n\n-- Incomplete\n"
    )
    assert found == "CMake Error at CMakeLists.txt:3 (find_package): No pybind11 -- Incomplete"
    assert against_commit.told("one\nKeyError: 'HS'\n") == "KeyError: 'HS'"
