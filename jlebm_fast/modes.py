"""The modes of torch that a chain runs in, whatever mode its caller is in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def chain_mode(device: torch.device, *, gradients: bool = False) -> Iterator[None]:
    """Outside inference_mode (gradients of energies are taken inside a chain), autocast off: chains are float32."""
    with torch.inference_mode(False), torch.set_grad_enabled(gradients):
        if torch.is_autocast_enabled(device.type):
            with torch.autocast(device.type, enabled=False):
                yield
        else:
            yield


def device_of(z: object) -> torch.device:
    """The device of latents in any structure; the CPU for what is no latents and will be refused."""
    first = z[0] if isinstance(z, (list, tuple)) and z else z
    return first.device if isinstance(first, torch.Tensor) else torch.device("cpu")
