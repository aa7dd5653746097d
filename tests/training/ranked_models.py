"""A few steps of every model, on one rank of several or in one process."""

import pathlib

import torch
from shapes import SMALL_RUN

from jlebm_fast.models import MODELS, used_fields
from jlebm_fast.training.distributed import joined_ranks
from jlebm_fast.training.options import TrainOptions
from jlebm_fast.training.run_folder import RunConfig, RunFolder
from jlebm_fast.training.sources import load_images
from jlebm_fast.training.trainer import Trainer

STEPS = 2  # of each stage


def options_of(model: str, images: pathlib.Path) -> TrainOptions:
    plain = TrainOptions(model=model)
    wanted = SMALL_RUN | {"conditional_hidden": 8, "posterior_steps": 2, "stage_steps": STEPS, "mixture_components": 2}
    fixed = {"data": str(images), "device": "cpu", "steps": STEPS, "model": model}
    read = used_fields(model, plain.resolved_prior) | {"batch_size", "log_every", "checkpoint_every"}
    return TrainOptions(**{name: value for name, value in wanted.items() if name in read} | fixed)


def learned(images: pathlib.Path) -> dict:
    """Model's name → (metrics of each step, state) after all its stages."""
    found = {}
    pictures = load_images(str(images))
    with joined_ranks(torch.device("cpu")) as ranks:
        for model in MODELS:
            options = options_of(model, images)
            config = RunConfig(options, pictures.size, pictures.channels, len(pictures.train), "")
            trainer = Trainer(RunFolder(pathlib.Path("nowhere")), config, pictures, ranks)
            metrics = [trainer.advance() for _ in range(trainer.total_steps)]
            found[model] = (metrics, trainer.state(0)["model"])
    return found
