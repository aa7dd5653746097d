"""What else than its parameters a recognised module computes with, so that a compiled graph sees it change."""

from __future__ import annotations

from torch import nn

from .recognition.snapshots import OF_EVERY_MODULE
from .recognition.watching import is_of_torch

Settings = tuple[tuple[str, type, tuple[tuple[str, float | str], ...]], ...]


def settings_of(net: nn.Module) -> Settings:
    """(path, class, numbers and words among the attributes) of each module that an activation may come from: all but
    torch's own with parameters, which are read at every call."""
    settings = []
    for path, module in net.named_modules():
        if module._parameters and is_of_torch(type(module)):
            continue
        attributes = [(name, value) for name, value in module.__dict__.items() if name not in OF_EVERY_MODULE]
        kept = [(name, value) for name, value in attributes if type(value) in (int, float, str)]
        settings.append((path, type(module), tuple(kept)))
    return tuple(settings)


def are_still(net: nn.Module, settings: Settings) -> bool:
    """Whether a module has these settings. A compiler watches what is read here: where an activation has got another
    slope, a layer another class, its graph does not hold any more."""
    for path, kind, attributes in settings:
        module = submodule(net, path)
        if type(module) is not kind:
            return False
        for name, value in attributes:
            if getattr(module, name, None) != value:
                return False
    return True


def submodule(net: nn.Module, path: str) -> nn.Module | None:
    """`net.get_submodule`, in what every compiler understands; None where there is none any more."""
    for name in path.split(".") if path else ():
        net = getattr(net, name, None)
    return net
