"""Learning-rate schedules: a factor on every optimiser's rate as a function of the step alone."""

from __future__ import annotations

import math

SCHEDULES = ("epoch", "constant", "cosine")


def rate_factor(
    schedule: str, step: int, n_steps: int, steps_per_epoch: int, *, decay: float = 1.0, warmup_steps: int = 0
) -> float:
    """The factor on the learning rates at a step, counted from 0.

        epoch      decay^e after e passes over the images         cosine     (1 + cos(π t/T))/2,  T the steps of the run
        constant   1                                              warm-up    × (t + 1)/W for the first W steps

    Args:
        schedule: one of `SCHEDULES`
        step, n_steps: place in the run, and its length (of the stage, for models that learn in stages)
        steps_per_epoch: steps of a pass over the images
        decay: factor after each epoch, for "epoch"
        warmup_steps: steps of the linear warm-up; 0 for none

    Returns:
        The factor, in [0, 1] for decay <= 1.

    Raises:
        ValueError: there is no such schedule.

    Example:
        >>> [rate_factor("cosine", t, 4, 1) for t in (0, 2)]
        [1.0, 0.5]

    Source: Cui, Wu, Han, ICCV 2023 (0.998 per epoch); Loshchilov and Hutter, "SGDR", ICLR 2017 (cosine); Goyal et al.,
    "Accurate, large minibatch SGD", 2017 (warm-up).
    """
    if schedule == "epoch":
        factor = decay ** (step // steps_per_epoch)
    elif schedule == "constant":
        factor = 1.0
    elif schedule == "cosine":
        factor = 0.5 * (1.0 + math.cos(math.pi * step / n_steps))
    else:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    return factor * (step + 1) / warmup_steps if step < warmup_steps else factor
