"""The modes of torch that a chain runs in, whatever mode its caller is in."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

V = TypeVar("V")
_CPU = torch.device("cpu")  # equality with it is a third of the time of asking a device for its type


class chain_mode:
    """Outside inference_mode (gradients of energies are taken inside a chain), autocast off: chains are float32.

    A class that enters only what differs: each of torch's own context managers costs one or two microseconds, and a
    chain of a hundred takes a few hundred of them.
    """

    __slots__ = ("_device", "_gradients", "_others", "_was")

    def __init__(self, device: torch.device, *, gradients: bool = False) -> None:
        self._device, self._gradients, self._others = device, gradients, None

    def __enter__(self) -> None:
        # the other two are modes of a compiled function's caller
        if not torch.compiler.is_compiling() and (_any_autocast() or torch.is_inference_mode_enabled()):
            self._enter_others()
        self._was = torch.is_grad_enabled()
        if self._was != self._gradients:
            _set_grad_enabled(self._gradients)

    def _enter_others(self) -> None:
        self._others = contextlib.ExitStack()
        if torch.is_inference_mode_enabled():
            self._others.enter_context(torch.inference_mode(False))
        if autocast_enabled(self._device):
            self._others.enter_context(torch.autocast(self._device.type, enabled=False))

    def __exit__(self, *error: object) -> None:
        if self._was != self._gradients:
            _set_grad_enabled(self._was)
        if self._others is not None:
            self._others.__exit__(*error)


def autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is on for tensors of that device; never on devices that have none."""
    return _any_autocast() and _has_autocast(device.type) and torch.is_autocast_enabled(device.type)


_set_grad_enabled = torch._C._set_grad_enabled  # what torch.set_grad_enabled, a context manager, calls
_any_autocast = torch._C._is_any_autocast_enabled  # a tenth of the time of asking for one device
_modes_of_dispatch = torch._C._len_torch_dispatch_stack
_transforms = torch._C._functorch.peek_interpreter_stack
jit_tracing = torch._C._is_tracing  # a third of the time of torch.jit.is_tracing, which asks for a script first
_has_autocast = functools.cache(torch.amp.autocast_mode.is_autocast_available)


def watched(z: Tensor | None = None) -> bool:
    """Whether somebody looks on: a compiler, a mode, a transform, a trace, or a tensor that is no plain one.

    Then the registered operator is called (`registration.py`); else the kernels directly, which costs less.
    """
    return (
        torch.compiler.is_compiling()
        or _modes_of_dispatch() > 0
        or _transforms() is not None
        or jit_tracing()
        or (z is not None and type(z) is not Tensor and type(z) is not torch.nn.Parameter)
    )


def under_a_mode() -> bool:
    """Whether operators go through a mode of dispatch first, which may give tensors without values."""
    return _modes_of_dispatch() > 0


def unwatched() -> bool:
    """`not watched()` of no tensor, outside a compiler."""
    return _modes_of_dispatch() == 0 and _transforms() is None and not jit_tracing()


def refuse_trace(name: str) -> None:
    """Refuse a call of `name` inside a trace of torch.jit, which would hold memory that no operation of it fills.

    Raises:
        RuntimeError: torch.jit records this call.
    """
    if torch.jit.is_tracing():  # a compiler knows that this is False; it does not know `jit_tracing`
        raise RuntimeError(
            f"{name} cannot be part of a trace of torch.jit (torch.jit.trace, torch.onnx.export with dynamo=False): "
            "a trace holds operations of torch and fixed numbers, so the kernels of this package would be missing in "
            "it, and every run would repeat the noise key of this one; call it outside of what is traced, or use "
            "torch.compile or torch.export. The forward of an EnergyMLP can be traced"
        )


@contextlib.contextmanager
def quiet_trace() -> Iterator[None]:
    """What runs inside is traced by torch.jit without its warnings of looks at sizes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        yield


@contextlib.contextmanager
def trace_paused() -> Iterator[None]:
    """What runs inside is no part of a trace of torch.jit; its results are constants there."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)


def transformed() -> bool:
    """Whether a transform of torch.func is at work around this call."""
    return _transforms() is not None


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph records what is done on that device now."""
    return device != _CPU and device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """The tensor's device as torch's current one, where kernels are launched."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def device_of(z: object) -> torch.device:
    """The device of latents in any structure; the CPU for what is no latents and will be refused."""
    first = z[0] if isinstance(z, (list, tuple)) and z else z
    return first.device if isinstance(first, torch.Tensor) else _CPU


def is_compiled(net: object) -> bool:
    """Whether it is what torch.compile makes of a module."""
    # the module that defines it takes seconds to import, and was imported if anything was compiled
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return compiler is not None and isinstance(net, compiler.OptimizedModule)


def copies_of_buffers(net: torch.nn.Module) -> dict[str, Tensor]:
    """A module's buffers for a run that may write into them, with the attributes that somebody gave them; and those of
    its parameters that were made inside torch.inference_mode, which autograd refuses as they are."""
    found = {
        name: parameter.clone()
        for name, parameter in net.named_parameters()
        if not is_lazy(parameter) and parameter.is_inference()
    }
    for name, buffer in net.named_buffers():
        found[name] = buffer.clone()
        found[name].__dict__.update(buffer.__dict__)
    return found


class ByIdentity(Generic[V]):
    """Something of each module, for as long as that lives; of two that say they are equal each has its own."""

    def __init__(self, make: Callable[[], V]) -> None:
        self._make, self._found, self._making = make, {}, threading.Lock()

    def __getitem__(self, net: torch.nn.Module) -> V:
        key = id(net)
        entry = self._found.get(key)
        if entry is None or entry[0]() is not net:
            with self._making:  # two threads must not each make one
                entry = self._found.get(key)
                if entry is None or entry[0]() is not net:
                    entry = (weakref.ref(net, lambda gone: self._forget(key, gone)), self._make())
                    self._found[key] = entry
        return entry[1]

    def _forget(self, key: int, gone: object) -> None:
        if key in self._found and self._found[key][0] is gone:
            del self._found[key]


# torch.func.functional_call exchanges a module's buffers while it runs: of two threads, each would put back the other's
_exchanging: ByIdentity[Any] = ByIdentity(threading.RLock)


def run_on_buffers(
    net: torch.nn.Module,
    buffers: dict[str, Tensor],
    args: tuple,
    options: dict[str, Any],
    owner: torch.nn.Module | None = None,
) -> Any:
    """What a module returns on other buffers, which it may write into; its own stay as they are. owner: whose they are,
    if not the module's."""
    if not buffers:
        return net(*args, **options)
    with _exchanging[owner or net]:
        return torch.func.functional_call(net, buffers, args, options)
