"""The four operations: arguments checked once, a backend chosen, called. Records in, plain tensors out.

Every check that any backend needs is made here, so all backends see the same inputs and give the same messages.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends
from .backends import cpu_plain, eager, float64
from .checks import SUPPORTED_DTYPES, check_like, describe, dtype_name, traced
from .modes import autocast_enabled, capturing, chain_mode, watched
from .problem import ACTIVATIONS, HEADS, MAX_HIDDEN_LAYERS, MLP, ChainResult, MLPSpec, Record, Update
from .rng import COUNTER_RANGE, check_noise_key, key_number

NOTHING = Record()
_CPU = torch.device("cpu")  # equality with it costs a third of asking a device for its type


def langevin_noise(
    noise_key: int | Tensor,
    n_steps: int,
    chains: int,
    dim: int,
    *,
    first_step: int = 0,
    first_chain: int = 0,
    stream: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """The noise field eps [n_steps, chains, dim] of a key."""
    place = (noise_key, n_steps, chains, dim, first_step, first_chain, stream, torch.device(device), dtype, backend)
    if watched():  # as in `_check_counters`
        _check_noise(*place[:7], dtype)
        return registration().langevin_noise(*place)
    return direct_noise(*place)


def langevin_step(z: Tensor, grad: Tensor, update: Update, *, backend: str = "auto") -> Tensor:
    """One update of z [chains, dim] with a given gradient [chains, dim]; the result is detached."""
    if watched(z):
        _check_counters(update)
        return registration().langevin_step(z, grad, update, backend)
    return direct_step(z, grad, update, backend)


def mlp_energy_grad(z: Tensor, mlp: MLP, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """f [chains] and its gradient [chains, dim] of an MLP; differentiable in z, weights, biases and context_bias."""
    if watched(z) or (torch.is_grad_enabled() and (forward_ad._current_level >= 0 or requires_grad(z, mlp))):
        return registration().mlp_energy_grad(z, mlp, backend)
    return direct_energy_grad(z, mlp, backend)


def mlp_langevin_chain(
    z: Tensor, mlp: MLP, update: Update, n_steps: int, record: Record = NOTHING, *, backend: str = "auto"
) -> ChainResult:
    """n_steps updates of z [chains, dim] with the MLP's own gradient; all results are detached."""
    if watched(z):
        _check_counters(update)
        return registration().mlp_langevin_chain(z, mlp, update, n_steps, record, backend)
    return direct_chain(z, mlp, update, n_steps, record, backend)


def registration() -> ModuleType:
    """The registered operators; they are built on this module."""
    from . import registration

    return registration


def requires_grad(z: Tensor, mlp: MLP) -> bool:
    return any(t is not None and t.requires_grad for t in (z, *mlp.weights, *mlp.biases, mlp.context_bias))


# --- the doors: checks, choice, call ----------------------------------------------------------------------------------


def direct_noise(
    noise_key: int | Tensor,
    n_steps: int,
    chains: int,
    dim: int,
    first_step: int,
    first_chain: int,
    stream: int,
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    if backend in cpu_plain.BACKENDS:
        out = cpu_plain.langevin_noise(noise_key, n_steps, chains, dim, first_step, first_chain, stream, device, dtype)
        if out is not None:
            return out
    _check_noise(noise_key, n_steps, chains, dim, first_step, first_chain, stream, dtype)
    if device != _CPU and device.type == "cuda":
        device = _usable_cuda(device)
    chosen = backends.choose("langevin_noise", backend, device=device, dtype=dtype)
    chosen = serving(chosen, backend, device, dtype)
    return chosen.langevin_noise(
        _key_for(chosen, noise_key, device),
        n_steps,
        chains,
        dim,
        first_step=first_step,
        first_chain=first_chain,
        stream=stream,
        device=device,
        dtype=dtype,
    )


def _check_noise(
    noise_key: int | Tensor,
    n_steps: int,
    chains: int,
    dim: int,
    first_step: int,
    first_chain: int,
    stream: int,
    dtype: torch.dtype,
) -> None:
    check_noise_key(noise_key)
    check_count("n_steps", n_steps)
    check_count("chains", chains)
    check_count("dim", dim)
    check_counter("first_step", first_step)
    check_counter("first_chain", first_chain)
    check_counter("stream", stream)
    if dtype not in SUPPORTED_DTYPES:
        raise ValueError(f"dtype must be float32 or float64, got {dtype}")


def _usable_cuda(device: torch.device) -> torch.device:
    """The device with its number: "cuda" is not equal to the device of a key on it."""
    if not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r} cannot be used: torch.cuda.is_available() is False (`jlebm info`)")
    return torch.device("cuda", torch.cuda.current_device()) if device.index is None else device


def direct_step(z: Tensor, grad: Tensor, update: Update, backend: str) -> Tensor:
    if backend in cpu_plain.BACKENDS:
        out = cpu_plain.langevin_step(z, grad, update)
        if out is not None:
            return out
    check_z(z)
    check_like("grad", grad, (tuple(z.shape),), z)
    check_update(update, z, 1)
    chosen = backends.choose("langevin_step", backend, device=z.device, dtype=z.dtype, update=update)
    chosen = serving(chosen, backend, z.device, z.dtype)
    z, grad, update = _in_memory(z), _in_memory(grad), _update_for(chosen, update, z.device)
    if not _attached(z.device):
        return chosen.langevin_step(z, grad, update)
    with chain_mode(z.device):
        return chosen.langevin_step(z, grad, update)


def direct_energy_grad(z: Tensor, mlp: MLP, backend: str) -> tuple[Tensor, Tensor]:
    if backend in cpu_plain.BACKENDS:
        found = cpu_plain.mlp_energy_grad(z, mlp)
        if found is not None:
            return found
    chosen = backend_of_energy_grad(z, mlp, backend)
    z = _in_memory(z)
    if not _attached(z.device):
        return chosen.mlp_energy_grad(z, mlp)
    with chain_mode(z.device):
        return chosen.mlp_energy_grad(z, mlp)


def backend_of_energy_grad(z: Tensor, mlp: MLP, backend: str) -> ModuleType:
    """The backend that serves the call, after the checks."""
    check_z(z, mlp.spec.dim)
    check_mlp(mlp, z)
    chosen = backends.choose("mlp_energy_grad", backend, device=z.device, dtype=z.dtype, spec=mlp.spec)
    return serving(chosen, backend, z.device, z.dtype)


def direct_chain(z: Tensor, mlp: MLP, update: Update, n_steps: int, record: Record, backend: str) -> ChainResult:
    if backend in cpu_plain.BACKENDS:
        found = cpu_plain.mlp_langevin_chain(z, mlp, update, n_steps, record)
        if found is not None:
            return found
    check_z(z, mlp.spec.dim)
    check_mlp(mlp, z)
    check_count("n_steps", n_steps)
    check_update(update, z, n_steps)
    check_thin(record.thin)
    z = _in_memory(z)
    if not _attached(z.device):
        return _chosen_chain(z, mlp, update, n_steps, record, backend)
    with chain_mode(z.device):
        return _chosen_chain(z, mlp, update, n_steps, record, backend)


def sampler_chain(z: Tensor, mlp: MLP, update: Update, n_steps: int, record: Record, backend: str) -> ChainResult:
    """`mlp_langevin_chain` inside a `chain_mode` on a contiguous z and an update that were made from checked options:
    what is left to check is what a user owns, the parameters and the counters.
    """
    if watched(z):
        _check_counters(update)
        return registration().mlp_langevin_chain(z, mlp, update, n_steps, record, backend)
    if backend in cpu_plain.BACKENDS:
        found = cpu_plain.mlp_langevin_chain(z, mlp, update, n_steps, record)
        if found is not None:
            return found
    check_z(z, mlp.spec.dim)
    check_mlp(mlp, z)
    _check_counters(update)
    return _chosen_chain(z, mlp, update, n_steps, record, backend)


def _chosen_chain(z: Tensor, mlp: MLP, update: Update, n_steps: int, record: Record, backend: str) -> ChainResult:
    device = z.device
    chosen = backends.choose("mlp_langevin_chain", backend, device=device, dtype=z.dtype, spec=mlp.spec, update=update)
    chosen = serving(chosen, backend, device, z.dtype)
    return chosen.mlp_langevin_chain(z, mlp, _update_for(chosen, update, device), n_steps, record)


def serving(chosen: ModuleType, backend: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The module that does what the backend does: in float64 on the CPU a faster one, unless eager was asked for."""
    return float64 if chosen is eager and backend == "auto" and float64.serves(device, dtype) else chosen


def _in_memory(tensor: Tensor) -> Tensor:
    """Row after row, and with its sign: the imaginary part of a conjugate is kept as its negative."""
    return tensor.contiguous().resolve_neg()


def _attached(device: torch.device) -> bool:
    """Whether autograd or autocast would see what a backend does in plain torch."""
    return torch.is_grad_enabled() or autocast_enabled(device)


def _key_for(chosen: ModuleType, noise_key: int | Tensor, device: torch.device) -> int | Tensor:
    """The key as the backend reads it: from memory of its own device where it says so, with READS_KEY_TENSORS."""
    if not isinstance(noise_key, Tensor):
        return noise_key
    if noise_key.device != _CPU and noise_key.device == device and getattr(chosen, "READS_KEY_TENSORS", False):
        return noise_key
    if capturing(noise_key.device):
        raise ValueError(
            f"backend {chosen.NAME!r} reads the noise key on the host, which no CUDA graph can capture; use backend "
            "'cuda' or 'triton', or pass noise"
        )
    return key_number(noise_key)


def _update_for(chosen: ModuleType, update: Update, device: torch.device) -> Update:
    key = _key_for(chosen, update.noise_key, device)
    return update if key is update.noise_key else update._replace(noise_key=key)


def check_count(name: str, value: int) -> None:
    if (not isinstance(value, int) or isinstance(value, bool) or value < 0) and not traced(value):
        raise ValueError(f"{name} must be an integer >= 0, got {value!r}")


def check_counter(name: str, value: int) -> None:
    if type(value) is int and 0 <= value < COUNTER_RANGE:  # the usual case, at once
        return
    if (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < COUNTER_RANGE) and not traced(value):
        raise ValueError(f"{name} must be an integer in [0, 2**32), got {value!r}")


def _check_counters(update: Update) -> None:
    """Needed before an operator too, which would refuse what is no integer in its own words, a compiler's."""
    check_counter("first_step", update.first_step)
    check_counter("first_chain", update.first_chain)


def check_thin(thin: int) -> None:
    if traced(thin):
        return
    if not isinstance(thin, int) or isinstance(thin, bool) or thin < 1:
        raise ValueError(f"thin must be an integer >= 1, got {thin!r}")
    if thin >= 1 << 63:
        raise ValueError(f"thin must be an integer below 2**63, got {thin!r}")


def check_z(z: Tensor, dim: int | None = None) -> None:
    """z [chains, dim], float32 or float64."""
    if (
        not isinstance(z, Tensor)
        or z.dim() != 2
        or z.dtype not in SUPPORTED_DTYPES
        or (dim is not None and z.shape[1] != dim)
    ):
        wanted = "dim" if dim is None else dim
        raise ValueError(f"z must be [chains, {wanted}] float32 or float64, got {describe(z)}")


def check_spec(spec: MLPSpec) -> None:
    """A spec that every backend may rely on."""
    n_hidden = len(spec.widths) - 2
    if not 1 <= n_hidden <= MAX_HIDDEN_LAYERS:
        raise ValueError(f"an energy MLP must have 1 to {MAX_HIDDEN_LAYERS} hidden layers, got {n_hidden}")
    if any(not isinstance(width, int) or width < 1 for width in spec.widths):
        raise ValueError(f"widths must be positive integers, got {spec.widths}")
    if len(spec.activations) != n_hidden or len(spec.activation_params) != n_hidden:
        raise ValueError(f"activations must name {n_hidden} layers, got {spec.activations}")
    for name in spec.activations:
        if name not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    if spec.head not in HEADS:
        raise ValueError(f"head must be one of {', '.join(HEADS)}, got {spec.head!r}")
    if spec.n_logits != 1 and spec.head not in ("logsumexp", "logit"):
        raise ValueError(
            f"head {spec.head!r} takes one logit, got {spec.n_logits}; use 'logsumexp' or a chosen logit y"
        )


def check_mlp(mlp: MLP, z: Tensor) -> None:
    """Parameters that fit the spec and z."""
    spec, weights, biases, context_bias, logit = mlp
    shapes = spec.weight_shapes
    if len(weights) != len(shapes) or len(biases) != len(shapes):
        raise ValueError(f"the MLP must have {len(shapes)} weights and biases, got {len(weights)}")
    dtype, device = z.dtype, z.device
    for weight, bias, shape, bias_shape in zip(weights, biases, shapes, spec.bias_shapes):
        if (
            weight.shape != shape
            or weight.dtype is not dtype
            or weight.device != device
            or (bias is not None and (bias.shape != bias_shape or bias.dtype is not dtype or bias.device != device))
        ):
            _refuse_parameters(mlp, z)
    if context_bias is not None:
        check_like("context_bias", context_bias, ((z.shape[0], spec.widths[1]),), z)
    if (logit is not None) != (spec.head == "logit"):
        raise ValueError("a chosen logit goes with head 'logit', and only with it")
    if logit is not None and (logit.dtype != torch.int64 or logit.shape != z.shape[:1] or logit.device != device):
        raise ValueError(f"logit must be [{z.shape[0]}] int64 on {device}, got {describe(logit)}")


def _refuse_parameters(mlp: MLP, z: Tensor) -> None:
    """Name the first weight or bias that does not fit."""
    for layer, (weight, bias, shape) in enumerate(zip(mlp.weights, mlp.biases, mlp.spec.weight_shapes)):
        for name, tensor, expected in (("weight", weight, shape), ("bias", bias, shape[:1])):
            if tensor is None or (tensor.shape == expected and tensor.dtype is z.dtype and tensor.device == z.device):
                continue
            raise ValueError(
                f"{name} {layer} of the energy must be {list(expected)} {dtype_name(z.dtype)} on {z.device} like z, "
                f"got {describe(tensor)}"
            )


def check_update(update: Update, z: Tensor, n_steps: int) -> None:
    """Coefficients, prior, mask, noise and counters that fit z."""
    chains, dim = z.shape
    steps, per_chain, mean, precision, frozen, noise, noise_key, first_step, first_chain, extra_grad = update
    check_like("step_coefficients", steps, ((n_steps, 3),), z)
    if per_chain is not None:
        check_like("chain_coefficients", per_chain, ((chains, 3),), z)
    if mean is not None:
        check_like("prior_mean", mean, ((dim,), (chains, dim)), z)
    if precision is not None:
        check_like("prior_precision", precision, ((dim,), (chains, dim)), z)
    if frozen is not None and (
        frozen.dtype != torch.bool or tuple(frozen.shape) not in ((dim,), (chains, dim)) or frozen.device != z.device
    ):
        raise ValueError(f"mask must be bool [{dim}] or [{chains}, {dim}] on {z.device}, got {describe(frozen)}")
    if noise is not None:
        check_like("noise", noise, ((n_steps, chains, dim),), z)
    if extra_grad is not None:
        check_like("extra_grad", extra_grad, ((chains, dim),), z)
    check_noise_key(noise_key)
    check_counter("first_step", first_step)
    check_counter("first_chain", first_chain)
