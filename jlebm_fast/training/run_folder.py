"""A run folder: config.json, metrics.jsonl, checkpoint.safetensors, figures/ and samples/."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import torch

from jlebm_fast.models import MODELS, LatentModel, build

from .averaging import put_parameters
from .checkpoints import load_checkpoint, write_atomically
from .errors import CheckpointError, RunError
from .options import TrainOptions

FORMAT = 1  # of config.json and checkpoint.safetensors


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
    def figures(self) -> pathlib.Path:
        return self.path / "figures"

    @property
    def samples(self) -> pathlib.Path:
        return self.path / "samples"

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
        if model not in MODELS:
            raise RunError(f'"{self.path}" holds a run of model "{model}"; this version knows: {", ".join(MODELS)}')
        try:
            options = content.pop("options")
            options = TrainOptions(**options | {"latent_dims": tuple(options["latent_dims"]), "model": model})
            return RunConfig(options=options, **content)
        except (TypeError, KeyError, ValueError, RunError) as error:
            raise RunError(f'"{self.config}" does not fit this version of jlebm_fast: {error}') from error

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        lines = self.metrics.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


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
    model = build_model(config).to(pick_device(device))
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
