"""Latents as users hold them, and the one flat tensor [chains, dim] that every operation works on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import SUPPORTED_DTYPES, describe, dtype_name, is_dense

Latents = Tensor | list[Tensor] | tuple[Tensor, ...]


class LatentLayout(NamedTuple):
    """How a caller's latents lie: hashable, and enough to rebuild them from the flat tensor.

    container   Tensor, list, tuple or a named tuple's class
    dims        width of each layer (one entry for a tensor)
    trailing    per layer the dimensions after the second: () or (1, 1)
    """

    container: type
    dims: tuple[int, ...]
    trailing: tuple[tuple[int, ...], ...]

    @property
    def dim(self) -> int:
        return sum(self.dims)

    def restore(self, flat: Tensor) -> Latents:
        """The flat tensor [chains, dim] in the caller's structure."""
        if self.container is Tensor:
            return flat if not self.trailing[0] else flat.view(*flat.shape, *self.trailing[0])
        # contiguous pieces: callers call .view on them
        if not any(self.trailing):
            return self._contained(torch.split_with_sizes_copy(flat, self.dims, dim=1))
        layers = [
            piece.contiguous() if not extra else piece.contiguous().view(*piece.shape, *extra)
            for piece, extra in zip(flat.split(self.dims, dim=1), self.trailing, strict=True)
        ]
        return self._contained(layers)

    def _contained(self, layers: list[Tensor] | tuple[Tensor, ...]) -> list[Tensor] | tuple[Tensor, ...]:
        if self.container is list:
            return list(layers)
        return tuple(layers) if self.container is tuple else self.container._make(layers)


def _is_layer(z: Tensor) -> bool:
    """[chains, dim] or [chains, dim, 1, 1], whose entries can be read."""
    return is_dense(z) and (z.dim() == 2 or (z.dim() == 4 and z.shape[2:] == (1, 1)))


def _check_layer(name: str, index: int, z: object, first: Tensor) -> None:
    if (
        isinstance(z, Tensor)
        and _is_layer(z)
        and z.shape[0] == first.shape[0]
        and z.dtype is first.dtype
        and z.device == first.device
    ):
        return
    raise ValueError(
        f"{name}[{index}] must be [{first.shape[0]}, dim] or [{first.shape[0]}, dim, 1, 1] {dtype_name(first.dtype)} "
        f"on {first.device} like {name}[0], got {describe(z)}"
    )


def flatten_latents(z: Latents, name: str = "z") -> tuple[Tensor, LatentLayout]:
    """The flat contiguous tensor [chains, dim] behind `z` (a new tensor, or a view of `z`) and its layout.

    name: what the caller of the package knows the argument by.
    """
    if isinstance(z, Tensor):
        if z.dtype not in SUPPORTED_DTYPES or not _is_layer(z):
            raise ValueError(
                f"{name} must be [chains, dim] or [chains, dim, 1, 1], float32 or float64, or a list of layers, "
                f"got {describe(z)}"
            )
        layout = LatentLayout(Tensor, (z.shape[1],), (tuple(z.shape[2:]),))
        flat = z.detach()
        return (flat if flat.dim() == 2 else flat.flatten(1)).contiguous().resolve_neg(), layout
    if not isinstance(z, (list, tuple)) or not z:
        came = f"an empty {type(z).__name__}" if isinstance(z, (list, tuple)) else describe(z)
        raise ValueError(f"{name} must be a tensor [chains, dim] or a list of layers [chains, d_l], got {came}")
    if not isinstance(z[0], Tensor) or z[0].dtype not in SUPPORTED_DTYPES or not _is_layer(z[0]):
        raise ValueError(
            f"{name}[0] must be [chains, dim] or [chains, dim, 1, 1], float32 or float64, got {describe(z[0])}"
        )
    first = z[0]
    chains, dtype, device = first.shape[0], first.dtype, first.device
    dims, plain = [], True
    for i, layer in enumerate(z):
        if not (
            isinstance(layer, Tensor)
            and is_dense(layer)
            and len(shape := layer.shape) == 2
            and shape[0] == chains
            and layer.dtype is dtype
            and layer.device == device
        ):
            _check_layer(name, i, layer, first)
            shape, plain = layer.shape, False
        dims.append(shape[1])
    named = isinstance(z, tuple) and hasattr(type(z), "_make")
    container = type(z) if named else list if isinstance(z, list) else tuple
    if plain:
        flat = torch.cat(z, dim=1)
        layout = LatentLayout(container, tuple(dims), ((),) * len(dims))
        return (flat.detach() if flat.requires_grad else flat), layout
    layout = LatentLayout(container, tuple(dims), tuple([tuple(layer.shape[2:]) for layer in z]))
    return torch.cat([layer if layer.dim() == 2 else layer.flatten(1) for layer in z], dim=1).detach(), layout


def flatten_mask(mask: object, layout: LatentLayout, flat: Tensor) -> Tensor | None:
    """A bool mask [dim] or [chains, dim], True where a coordinate is frozen, from any of the accepted forms.

    Accepted: a list of one bool per layer, a list of one bool tensor ([d_l] or [chains, d_l]) per layer,
    a bool tensor [dim] or [chains, dim].
    """
    if mask is None:
        return None
    chains, dim = flat.shape
    if isinstance(mask, (list, tuple)):
        if len(mask) != len(layout.dims):
            raise ValueError(f"mask must have {len(layout.dims)} entries, one per layer of z, got {len(mask)}")
        layers = []
        for i, (entry, d) in enumerate(zip(mask, layout.dims, strict=True)):
            if isinstance(entry, bool):
                entry = torch.full((d,), entry, dtype=torch.bool, device=flat.device)
            layers.append(_check_mask(f"mask[{i}]", entry, chains, d, flat.device))
        if any(layer.dim() == 2 for layer in layers):
            layers = [layer.expand(chains, -1) for layer in layers]
        return torch.cat(layers, dim=-1).contiguous()
    return _check_mask("mask", mask, chains, dim, flat.device).contiguous()


def _check_mask(name: str, mask: object, chains: int, dim: int, device: torch.device) -> Tensor:
    if isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.device == device:
        squeezed = mask.flatten(1) if mask.dim() == 4 else mask
        if tuple(squeezed.shape) in ((dim,), (chains, dim)):
            return squeezed
    raise ValueError(
        f"{name} must be a bool tensor [{dim}] or [{chains}, {dim}] on {device}, or one bool per layer "
        f"(True freezes), got {describe(mask)}"
    )
