"""Parameter names of the published checkpoints, translated into those of EnergyMLP."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from .energy import EnergyMLP

# how a layer's tensors are called in other codes → here; the first is plain, the second torch.nn.utils.spectral_norm,
# the third torch.nn.utils.parametrizations.spectral_norm
_SUFFIXES = {
    "weight": "weight",
    "bias": "bias",
    "weight_orig": "weight",
    "weight_u": "weight_u",
    "weight_v": "weight_v",
    "parametrizations.weight.original": "weight",
    "parametrizations.weight.0._u": "weight_u",
    "parametrizations.weight.0._v": "weight_v",
}


def _split(key: str) -> tuple[str, str] | None:
    """("energy.fc1", "weight_orig") for "energy.fc1.weight_orig"; None for a key that is no layer's."""
    for suffix in sorted(_SUFFIXES, key=len, reverse=True):
        if key.endswith("." + suffix):
            return key[: -len(suffix) - 1], suffix
    return None


def _in_order(stems: list[str], widths: dict[str, Any], expected: list[Any]) -> list[str]:
    """The layers' names from input to output, whatever order the file has: "fc2" before "fc10".

    Names that differ only in their numbers share out the places that they have among the others. Where the layers do
    not fit in that order (their shapes are not `expected`), the ones without a number are tried last, then first.
    """
    numbers = {stem: [int(found) for found in re.findall(r"[0-9]+", stem)] for stem in stems}
    families: dict[str, list[str]] = {}
    for stem in stems:
        families.setdefault(re.sub(r"[0-9]+", "#", stem), []).append(stem)
    turns = {family: iter(sorted(members, key=numbers.__getitem__)) for family, members in families.items()}
    placed = [next(turns[re.sub(r"[0-9]+", "#", stem)]) for stem in stems]
    single = [stem for stem in placed if len(families[re.sub(r"[0-9]+", "#", stem)]) == 1]
    several = [stem for stem in placed if stem not in single]
    for order in (placed, several + single, single + several):
        if [widths[stem] for stem in order] == expected:
            return order
    return placed


def rename_keys(energy: EnergyMLP, state_dict: dict[str, Any], prefix: str) -> None:
    """While loading: foreign names (`energy.fc1.weight`, `ebm.0.weight_orig`, …) become `layers.l.…`, by their numbers.

    Runs on the shallow copy that load_state_dict makes. Leaves the names alone, and so torch's own messages about
    missing and unexpected keys in place, when they are native or when the layers do not match in number.
    """
    foreign = [key for key in state_dict if key.startswith(prefix) and isinstance(state_dict[key], Tensor)]
    if any(key.startswith(prefix + "layers.") for key in foreign):
        return
    stems: dict[str, dict[str, str]] = {}
    for key in foreign:
        split = _split(key)
        if split is None:
            return
        stems.setdefault(split[0], {})[split[1]] = key
    if len(stems) != len(energy.layers):
        return
    widths = {
        stem: next(
            (tuple(state_dict[key].shape[:2]) for suffix, key in names.items() if _SUFFIXES[suffix] == "weight"), ()
        )
        for stem, names in stems.items()
    }
    expected = [tuple(layer.weight.shape) for layer in energy.layers]
    stems = {stem: stems[stem] for stem in _in_order(list(stems), widths, expected)}
    here = tuple(layer.spectral_norm for layer in energy.layers)
    there = tuple(any(_SUFFIXES[suffix] == "weight_u" for suffix in names) for names in stems.values())
    if here != there:
        fitting = there[0] if len(set(there)) == 1 else there
        raise ValueError(
            f"the checkpoint needs another spectral norm: make this EnergyMLP with spectral_norm={fitting}"
        )
    for number, names in enumerate(stems.values()):
        for suffix, key in names.items():
            value = state_dict.pop(key)
            target = _SUFFIXES[suffix]
            if target == "weight" and value.dim() == 4 and value.shape[2:] == (1, 1):
                value = value.flatten(1)  # a 1 x 1 convolution on [chains, dim, 1, 1] is a linear layer
            state_dict[f"{prefix}layers.{number}.{target}"] = value
