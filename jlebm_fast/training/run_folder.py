"""A run folder: config.json, metrics.jsonl, checkpoint.safetensors, evaluation.json, figures/ and samples/."""

from __future__ import annotations

import dataclasses
import errno
import json
import pathlib
import re
import sys
from typing import IO, Any, BinaryIO

import torch

from jlebm_fast.models import MODELS, LatentModel, build

from ..errors import CheckpointError, RunError
from .averaging import put_parameters
from .checkpoints import load_checkpoint
from .files import write_atomically
from .options import TrainOptions
from .read_fields import require_fields
from .sources import Images

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

FORMAT = 1  # of config.json and checkpoint.safetensors
IMAGE_SIZES, IMAGE_CHANNELS = (8, 16, 32, 64, 128, 256), (1, 3)
FIGURES = ("samples", "reconstructions", "layers_swapped", "layers_masked", "traverse", "learning", "long_chain")
EVALUATION_FIGURES = ("evaluation_energies", "evaluation_chains")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What config.json holds.

    options              as given to `jlebm train`
    image_size, image_channels   of the images as the nets see them
    n_images             training images
    image_fingerprint    hash of the training images
    """

    options: TrainOptions
    image_size: int
    image_channels: int
    n_images: int
    image_fingerprint: str


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Paths and files of one run."""

    path: pathlib.Path

    @property
    def config(self) -> pathlib.Path:
        return self.path / "config.json"

    @property
    def metrics(self) -> pathlib.Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoint(self) -> pathlib.Path:
        return self.path / "checkpoint.safetensors"

    @property
    def evaluation(self) -> pathlib.Path:
        return self.path / "evaluation.json"

    @property
    def figures(self) -> pathlib.Path:
        return self.path / "figures"

    @property
    def samples(self) -> pathlib.Path:
        return self.path / "samples"

    def parts_of_a_run(self) -> list[str]:
        """Names of the files here that only training writes and cannot be had again; without those of configuration
        and products."""
        metrics = self.metrics.is_file() and self.metrics.stat().st_size > 0  # an empty one is made to be locked
        return [path.name for path, is_there in ((self.checkpoint, self.checkpoint.exists()), (self.metrics, metrics))
                if is_there]  # fmt: skip

    def open_metrics(self) -> BinaryIO:
        """metrics.jsonl to append to, locked against other processes until it is closed or this process ends.

        Raises:
            RunError: another process trains here.
        """
        metrics = open(self.metrics, "ab")  # noqa: SIM115 (the caller closes it)
        if not locked(metrics):
            metrics.close()
            raise RunError(
                f'another process is training in "{self.path}": wait until it has ended, or take another folder'
            )
        return metrics

    def remove_evaluation(self) -> None:
        """Removes what `jlebm evaluate` wrote."""
        self.evaluation.unlink(missing_ok=True)
        self._remove(self.figures, [f"{name}.png" for name in EVALUATION_FIGURES])

    def remove_products(self) -> None:
        """Removes what was made from the checkpoint: evaluation, figures and samples, and nothing of the user's."""
        self.remove_evaluation()
        self._remove(self.figures, [f"{name}.png" for name in FIGURES])
        pngs = self.samples / "png"
        self._remove(pngs, [path.name for path in numbered_pngs(pngs)])
        self._remove(self.samples, ["samples.npz", "samples.png"])

    @staticmethod
    def _remove(folder: pathlib.Path, names: list[str]) -> None:
        """Removes files, and their folder if nothing else is in it; a link to a folder elsewhere is left alone."""
        if folder.is_symlink() or not folder.is_dir():
            return
        for name in names:
            if not (folder / name).is_dir():
                (folder / name).unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()

    def require_same_images(self, config: RunConfig, images: Images, *, in_order: bool = False) -> None:
        """
        Arguments:
            in_order: their order matters too, since training goes on.

        Raises:
            RunError: these are not the images that the run was trained on.
        """
        images.require_fingerprint(config.image_fingerprint, self.path, in_order=in_order)

    def write_config(self, config: RunConfig) -> None:
        content = {"format": FORMAT, "model": config.options.model, **dataclasses.asdict(config)}
        write_atomically(self.config, (json.dumps(content, indent=2) + "\n").encode())

    def read_config(self) -> RunConfig:
        """The run's configuration.

        Raises:
            RunError: no run is here, or one of another model, format or hand.
        """
        if not self.path.is_dir():
            raise RunError(f'no run folder at "{self.path}"')
        if not self.config.is_file():
            raise RunError(f'"{self.path}" is not a run folder: it has no config.json')
        try:
            content = json.loads(self.config.read_text(encoding="utf-8"))
        except (ValueError, UnicodeDecodeError) as error:
            raise RunError(f'"{self.config}" is not readable JSON: {error}') from error
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise RunError(f'"{self.config}" is not the configuration of a jlebm_fast run of format {FORMAT}')
        model = content.pop("model", None)
        if isinstance(model, str) and model not in MODELS:
            raise RunError(f'"{self.path}" holds a run of model "{model}"; this version knows: {", ".join(MODELS)}')
        try:
            options = content.pop("options", None)
            require_fields({"model": model}, {"model": str})
            require_fields({"options": options}, {"options": dict})
            options = options | {"model": model}
            _require_known("options.", options, TrainOptions)
            require_fields(options, TrainOptions, "options.")
            options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
            kinds = {"image_size": IMAGE_SIZES, "image_channels": IMAGE_CHANNELS, "n_images": int}
            kinds["image_fingerprint"] = str
            _require_known("", content, RunConfig)
            require_fields({name: content.get(name) for name in kinds}, kinds)
            return RunConfig(options=TrainOptions(**options), **content)
        except (TypeError, RunError) as error:
            raise RunError(
                f'"{self.config}" does not fit this version of jlebm_fast: {error}; put back what jlebm train wrote'
            ) from error

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, without a last one that is cut off; none if there is no such file.

        Raises:
            RunError: a line before the last is damaged.
        """
        lines = self.metrics.read_bytes().splitlines() if self.metrics.exists() else []
        while lines and not lines[-1].strip():
            lines.pop()
        found = [self._metrics_line(i, line, may_be_damaged=i == len(lines)) for i, line in enumerate(lines, 1)]
        return [values for values in found if values is not None]

    def metrics_until(self, step: int, length: int) -> int:
        """Bytes of metrics.jsonl up to a checkpoint, written at `step` when the file had `length` bytes.

        Lines that have been lost since are missed, and that is said, but nothing keeps the run from going on.

        Raises:
            RunError: one of the lines is damaged.
        """
        kept = 0
        for i, line in enumerate(self.metrics.read_bytes().splitlines(keepends=True), 1):
            values = self._metrics_line(i, line, may_be_damaged=kept >= length or not line.endswith(b"\n"))
            later = values["step"] > step if values is not None else bool(line.strip())
            if later or not line.endswith(b"\n"):
                break
            kept += len(line)
        if kept < length:
            print(
                f'jlebm: "{self.metrics}" has lost lines from before step {step}, its curves miss them',
                file=sys.stderr,
            )
        return kept

    def _metrics_line(self, number: int, line: bytes, *, may_be_damaged: bool) -> dict[str, Any] | None:
        """The values of a line; None for an empty one, and for a damaged one where that may be."""
        try:
            values = json.loads(line) if line.strip() else None
        except ValueError:
            values = {}
        if values is None or (isinstance(values, dict) and type(values.get("step")) is int):
            return values
        if may_be_damaged:
            return None
        raise RunError(
            f'line {number} of "{self.metrics}" is damaged: it must be a JSON object with a step, got {line[:40]!r}; '
            "put the file back as it was, or delete that line"
        )


def _require_known(prefix: str, values: dict[str, Any], kind: type) -> None:
    """
    Raises:
        RunError: a name is none of the fields of the dataclass `kind`.
    """
    unknown = [name for name in values if name not in {field.name for field in dataclasses.fields(kind)}]
    if unknown:
        raise RunError(f"{prefix}{unknown[0]} is unknown to it")


def numbered_pngs(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files that `jlebm sample --png-files` wrote into `folder`: 000000.png, 000001.png, …"""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if re.fullmatch(r"[0-9]{6,}\.png", path.name) and not path.is_dir())


def locked(file: IO[Any]) -> bool:
    """Whether this process has `file` for itself now, until it is closed or the process ends.

    True as well on a file system without locks: the work must be possible all the same.
    """
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


def build_model(config: RunConfig) -> LatentModel:
    """The untrained model of a run, on the CPU; its parameters come from torch's global random state."""
    options = config.options
    return build(options.model, options.model_config(), config.image_size, config.image_channels, config.n_images)


def load_state(model: torch.nn.Module, state: dict[str, Any], path: pathlib.Path) -> None:
    """Puts a checkpoint's parameters into `model`.

    Raises:
        CheckpointError: they belong to another model.
    """
    try:
        model.load_state_dict(state["model"])
    except (KeyError, RuntimeError, AttributeError, TypeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise CheckpointError(f'"{path}" belongs to another model: {lines[min(1, len(lines) - 1)]}') from error


def open_run(path: pathlib.Path | str, device: str = "auto") -> tuple[RunFolder, RunConfig, LatentModel]:
    """The trained model of a run folder, ready to sample from, in evaluation mode: with averaged parameters, if the
    run averages them.

    Raises:
        RunError: there is no run, it has no checkpoint yet, or the checkpoint is damaged or of another model.
    """
    folder = RunFolder(pathlib.Path(path))
    config = folder.read_config()
    if not folder.checkpoint.is_file():
        raise CheckpointError(f'"{folder.path}" has no checkpoint yet: let jlebm train write one')
    try:
        model = build_model(config).to(pick_device(device))
    except ValueError as error:
        raise RunError(f'"{folder.config}" describes no model that can be built: {error}') from error
    state = load_checkpoint(folder.checkpoint)
    load_state(model, state, folder.checkpoint)
    if "average" in state:
        put_parameters(dict(model.named_parameters()), state["average"])
    return folder, config, model.eval()


def pick_device(name: str) -> torch.device:
    """ "auto" is a GPU if there is one.

    Raises:
        RunError: "cuda" without a usable GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise RunError("--device cuda: torch sees no CUDA GPU here; use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
