"""The command line `jlebm`: train, sample, figures, evaluate, reproduce, bench, verify, info."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .errors import FAILURE, INTERRUPTED, PIPE_CLOSED, USAGE_ERROR, RunError
from .status import print_versions

if TYPE_CHECKING:
    from .training.options import TrainOptions

# Modules of the extra "train"; the core runs without them.
EXTRA_MODULES = {"tyro", "tqdm", "matplotlib", "datasets", "pyarrow", "PIL", "sklearn", "safetensors"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `jlebm` with `arguments` (default: the process's) and returns its exit code.

    0: done. 1: the command failed, one sentence on stderr says why. 2: the arguments are wrong. 130: interrupted, by
    Ctrl-C or SIGINT; a training run answers SIGTERM too, after a checkpoint, and ends with 143.
    141: whoever read the output has closed the pipe (`jlebm info | head -1`), which nothing needs to be said of.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without ∝ and Fréchet's é shows ? in their place
    try:
        code = _main(list(sys.argv[1:] if arguments is None else arguments))
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a closed pipe can be answered, and not when Python ends
        return code
    except BrokenPipeError:
        # what is still to be written has nowhere to go: Python's own flush at its end shall not complain of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _ended(PIPE_CLOSED)
    except KeyboardInterrupt:
        return _ended(_fail("interrupted", INTERRUPTED))
    except ImportError as error:
        if not isinstance(error.__cause__, KeyboardInterrupt):  # of a compiled module that was just beginning
            raise
        return _ended(_fail("interrupted", INTERRUPTED))


def _main(arguments: list[str]) -> int:
    try:
        import tyro  # noqa: F401
    except ModuleNotFoundError as error:
        code = _missing_module(error)
        if arguments == ["info"]:  # must help exactly where something is missing
            print_versions()
        return code
    try:
        _require_no_empty(arguments)
        return _ended(_bench(arguments[1:]) if arguments[:1] == ["bench"] else _run(arguments))
    except ModuleNotFoundError as error:
        return _missing_module(error)
    except RunError as error:
        # what all ranks of a run end with is said by one of them
        code = getattr(error, "exit_code", FAILURE)
        return _ended(code if error.shared and os.environ.get("RANK", "0") != "0" else _fail(str(error), code))
    except BrokenPipeError as error:
        if _reader_left():
            raise
        return _fail(error.strerror)
    except OSError as error:  # a full disk, a folder without permission: nothing to learn from a traceback
        return _fail(f"{error.strerror or error}" + (f': "{error.filename}"' if error.filename else ""))
    except (MemoryError, RuntimeError) as error:
        wanted = _memory_wanted(error)
        if wanted is None:
            raise
        return _fail(f"out of memory{wanted}: ask for fewer samples, smaller batches, or a smaller model")


def _memory_wanted(error: MemoryError | RuntimeError) -> str | None:
    """ ", 8000 bytes were wanted" where the error says so; None for an error that is not of memory. On the CPU torch
    raises one with no class of its own."""
    import torch

    found = re.search(r"ried to allocate ([\d.]+ \w+)", str(error))
    if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not (found and "memory" in str(error)):
        return None
    return f", {found[1]} were wanted" if found else ""


def _reader_left() -> bool:
    """Whether a broken pipe is that of the standard output, which then breaks again, and not a connection's."""
    try:
        print(flush=True)
    except BrokenPipeError:
        return True
    return False


def _ended(code: int) -> int:
    """`code`, to be returned; one of several ranks ends with it here, for the release of their group, which an error
    still holds and Python's own end lets go, can wait for ever."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _fail(sentence: str, code: int = FAILURE) -> int:
    print(f"jlebm: {sentence}", file=sys.stderr)
    return code


def _missing_module(error: ModuleNotFoundError) -> int:
    if error.name is None or error.name.split(".")[0] not in EXTRA_MODULES:
        raise error
    return _fail(f"this command needs the module {error.name}: pip install 'jlebm_fast[train]'")


def _bench(arguments: list[str]) -> int:
    """Hands over to the benchmarks, which have their own options; those are checked here, for one style of message."""
    import tyro

    from .bench import main as bench
    from .bench.report import BenchOptions

    checked = _parsed(lambda: tyro.cli(BenchOptions, args=arguments, prog="jlebm bench"))
    return bench(arguments) if isinstance(checked, BenchOptions) else checked


def _require_no_empty(arguments: list[str]) -> None:
    """An empty path would be taken for the present folder."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        option = argument[:-1] if argument.startswith("--") and argument.endswith("=") else before
        if argument == "" or option != before:
            where = f"after {option}" if option else "as the command"
            raise RunError(f'{where} must come a value or a path, got "": give one (an unset shell variable?)')


def _run(arguments: list[str]) -> int:
    import tyro

    from .training.commands import COMMANDS
    from .training.distributed import require_one_process

    def parse(default: Any = None) -> Any:
        if default is not None:
            return tyro.cli(type(default), args=arguments[1:], prog="jlebm train", default=default, config=config)
        return tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="jlebm", description=(__doc__ or "").strip(), args=arguments, config=config
        )

    config = (tyro.conf.OmitArgPrefixes,)
    command = _parsed(parse)
    if not dataclasses.is_dataclass(command):
        return int(command)
    if getattr(command, "resume", False):
        # Options that are not given keep the run's own values: parse again with those as the defaults.
        saved = dataclasses.replace(command, training=_saved_options(command.run))
        command = _parsed(lambda: parse(saved))
        if not dataclasses.is_dataclass(command):
            return int(command)
        _require_unchanged(saved.training, command.training)
        _require_one_length(saved.training, command.training)
    elif arguments[0] == "train":
        _require_one_length(type(command.training)(), command.training)
    if arguments[0] != "train":
        require_one_process(arguments[0])
    return command.execute()


def _parsed(parse: Callable[[], Any]) -> Any:
    """The parsed command, or an exit code after one sentence on stderr (--help exits with 0)."""
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return parse()
    except SystemExit as stop:
        if not stop.code:
            return 0
        # The parser draws a box; what it says is between its frames, before the pointer to --help.
        lines = [line.strip("│╭╮╰╯─ ") for line in message.getvalue().splitlines()]
        lines = [line for line in lines[1:] if line]
        said = []
        for line in lines:
            if line.startswith(("For full helptext", "Argument helptext")):
                break
            said.append(line)
        return _fail(
            " ".join(said or lines) + " (jlebm --help and jlebm COMMAND --help list what there is)", USAGE_ERROR
        )


def _saved_options(run: pathlib.Path) -> TrainOptions:
    from .training.run_folder import RunFolder

    return RunFolder(run).read_config().options


def _require_one_length(before: TrainOptions, given: TrainOptions) -> None:
    if given.epochs and given.steps != before.steps:
        raise RunError(f"--steps does nothing with --epochs {given.epochs}: leave it out, or say --epochs 0")


def _require_unchanged(saved: TrainOptions, given: TrainOptions) -> None:
    for field in dataclasses.fields(saved):
        before, now = getattr(saved, field.name), getattr(given, field.name)
        if before != now and field.name not in saved.resumable_changes():
            option = "--" + field.name.replace("_", "-")
            raise RunError(f"--resume cannot change {option} from {before} to {now}: start another run for that")
