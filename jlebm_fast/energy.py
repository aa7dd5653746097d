"""EnergyMLP: the energy networks of the papers, f(z) = head(MLP([z_1 … z_L; c])), as an nn.Module."""

from __future__ import annotations

import copy
import math
import numbers
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import fused_energy, published_checkpoints
from .checks import SUPPORTED_DTYPES, describe, dtype_name, has_memory, is_dense, whole
from .latents import LatentLayout, flatten_latents
from .modes import capturing, jit_tracing, quiet_trace, trace_paused, unwatched
from .ops import check_spec
from .problem import ACTIVATIONS, HEADS, MLP, MLPSpec
from .spectral import iterated_vectors, normalised_weights, top_singulars


class EnergyLinear(nn.Linear):
    """nn.Linear whose effective weight may be spectrally normalised, W / sigma_max(W), with converged vectors.

    Buffers weight_u [out] and weight_v [in] hold the singular vectors between calls, so that convergence costs one or
    two power iterations; only a forward in training mode writes them.
    """

    def __init__(self, in_features: int, out_features: int, *, spectral_norm: bool) -> None:
        super().__init__(in_features, out_features)
        self.spectral_norm = spectral_norm
        if spectral_norm:
            self.register_buffer("weight_u", self.weight.new_empty(out_features))
            self.register_buffer("weight_v", self.weight.new_empty(in_features))
            self._reset_vectors()

    def reset_parameters(self) -> None:
        """nn.Linear's, and singular vectors of the new weight: what deferred initialisation calls after `to_empty`."""
        super().reset_parameters()
        if "weight_u" in self._buffers:  # nn.Linear's constructor comes here before there are any
            self._reset_vectors()

    def _reset_vectors(self) -> None:
        with torch.no_grad():
            for vector in (self.weight_u, self.weight_v):
                vector.copy_(F.normalize(torch.randn_like(vector), dim=0))
        if has_memory(self.weight) and not self.weight.is_meta:  # without values there is nothing to converge to
            self.effective_weight(keep_vectors=True)

    def effective_weight(self, *, keep_vectors: bool = False) -> Tensor:
        """W, or W / (uᵀ W v): differentiable in W, with u and v taken as constants."""
        return effective_weights((self,), keep_vectors=keep_vectors)[0]


def _own(layers: Sequence[EnergyLinear], name: str) -> list[Tensor | None]:
    """weight or bias of each layer, in the usual case without nn.Module's slow attribute access."""
    return [
        layer._parameters[name] if type(layer) is EnergyLinear and name in layer._parameters else getattr(layer, name)
        for layer in layers
    ]


def _is_hooked(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def effective_weights(layers: Sequence[EnergyLinear], *, keep_vectors: bool = False) -> list[Tensor]:
    """The weight of each layer as the energy uses it; all norms are converged in one go.

    keep_vectors writes the converged singular vectors into the layers' buffers.
    """
    for layer in layers:
        if not isinstance(layer, EnergyLinear):
            raise ValueError(
                f"the layers of an EnergyMLP must stay its own, got {type(layer).__name__}; copy weights into them "
                "(load_state_dict), or give FastLangevin a module of another class"
            )
    weights, normed = _own(layers, "weight"), []
    for place, layer in enumerate(layers):
        if _is_hooked(layer):
            raise ValueError(
                "a layer of an EnergyMLP carries a hook (an old-style norm, pruning), which its fused forward never "
                "runs; use EnergyMLP(spectral_norm=True), or torch.nn.utils.parametrize"
            )
        if layer.spectral_norm:
            normed.append((place, layer))
    if not normed:
        return weights
    pairs = [(weights[place], layer._buffers["weight_u"]) for place, layer in normed]
    if torch.compiler.is_compiling():
        return _weights_in_graph(weights, normed, keep_vectors)
    if torch._C._functorch.peek_interpreter_stack() is not None:
        # a transform maps over weights: nothing may look at their values, or write a buffer it does not know
        for (place, _), (weight, u) in zip(normed, pairs, strict=True):
            u, v = iterated_vectors(weight, u)
            weights[place] = weight / torch.dot(u, torch.mv(weight, v))
        return weights
    if jit_tracing() and not keep_vectors:
        return _weights_in_trace(weights, normed, pairs)
    if not unwatched():  # a mode sees operators, and may make tensors without memory
        return _weights_in_graph(weights, normed, keep_vectors)
    if not keep_vectors and not torch.is_grad_enabled():
        for (place, _), weight in zip(normed, normalised_weights(pairs), strict=True):
            weights[place] = weight
        return weights
    keep = [(layer.weight_u, layer.weight_v) for _, layer in normed] if keep_vectors else None
    # by numpy or a kernel of our own: nothing that a mode of the caller's could follow
    with torch._C.DisableTorchFunction():
        tops = top_singulars(pairs, keep)
    for (place, _), top in zip(normed, tops, strict=True):
        if torch.is_grad_enabled():
            weights[place] = weights[place] / torch.dot(top.u, torch.mv(weights[place], top.v))
        else:
            weights[place] = top.normalised
    return weights


def _weights_in_graph(
    weights: list[Tensor], normed: list[tuple[int, EnergyLinear]], keep_vectors: bool
) -> list[Tensor]:
    """`effective_weights` for a compiler: the iterations are one operator per layer."""
    for place, layer in normed:
        weight = weights[place]
        u, v, sigma = torch.ops.jlebm_fast.top_singular.default(weight.detach(), layer.weight_u)
        if keep_vectors:
            finite = torch.isfinite(sigma)
            with torch.no_grad():
                layer.weight_u.copy_(torch.where(finite, u, layer.weight_u))
                layer.weight_v.copy_(torch.where(finite, v, layer.weight_v))
        # a trace may be made without gradients, and run with them
        followed = torch.is_grad_enabled() or torch.jit.is_tracing()
        weights[place] = weight / (torch.dot(u, torch.mv(weight, v)) if followed else sigma)
    return weights


def _weights_in_trace(
    weights: list[Tensor], normed: list[tuple[int, EnergyLinear]], pairs: list[tuple[Tensor, Tensor]]
) -> list[Tensor]:
    """`effective_weights` in a trace of torch.jit: operations of torch alone, which also run where this package is not.

    The vectors of this moment are constants of the trace: by iterations it would need some eighty operations per layer.
    """
    with trace_paused(), torch.no_grad():
        tops = top_singulars(pairs)
    for (place, _), top in zip(normed, tops, strict=True):
        weights[place] = weights[place] / torch.dot(top.u, torch.mv(weights[place], top.v))
    return weights


def _entries(value: object) -> tuple:
    """One integer or several as a tuple; empty of what is neither."""
    if isinstance(value, bool):
        return ()
    if isinstance(value, numbers.Integral):
        return (whole(value),)
    several = isinstance(value, Iterable) and not isinstance(value, (str, bytes)) and getattr(value, "ndim", 1)
    return tuple(map(whole, value)) if several else ()


def _check_dims(latent_dims: object) -> tuple[int, ...]:
    dims = _entries(latent_dims)
    if not dims or any(not isinstance(d, int) or d < 1 for d in dims):
        raise ValueError(f"latent_dims must be one or more positive integers, got {latent_dims!r}")
    return dims


def _name_logits(y: Tensor, n_logits: int) -> bool:
    """Whether every entry is a logit's number; believed while a graph is compiled, traced or captured, which no value
    can leave: a chain whose number is none is NaN then."""
    if torch.compiler.is_compiling() or jit_tracing() or y.numel() == 0 or capturing(y.device):
        return True
    return int(y.min()) >= 0 and int(y.max()) < n_logits


class EnergyMLP(nn.Module):
    """Energy f(z) = head(W_out h_L + b_out), h_l = phi(W_l h_{l−1} + b_l), h_0 = [z_1 … z_L; c].

    Args:
        latent_dims: widths of the latent layers (d_1, …, d_L), or one width
        hidden: units per hidden layer, or a sequence of `depth` widths
        depth: hidden layers, 1 to 16
        activation: leaky_relu, relu, gelu (exact, erf), gelu_tanh, silu, mish, tanh, softplus, elu or identity
        negative_slope: slope of leaky_relu left of zero
        out_features: logits J
        head: identity, tanh, sigmoid, softplus (J = 1), logsumexp (over J logits) or logit (one chosen logit y)
        spectral_norm: divide every weight by its largest singular value, computed to convergence (see `spectral.py`);
            or one bool per linear layer, depth + 1 of them
        context_dim: width of a condition c appended to z

    Shape:
        forward(z, context=None, y=None) -> f [chains]; z [chains, dim], [chains, dim, 1, 1] or a list of layers
        [chains, d_l]; context [chains, context_dim] or [context_dim]; y [chains] int64 or an int. With y, a logsumexp
        head gives the chosen logit instead. Differentiable, also twice, in z, context and the parameters; a spectral
        norm's singular vectors are constants then, as torch's are: twice in one weight it is not exact.

    Raises:
        ValueError: an argument outside the ranges above, or an input that does not fit.

    Example:
        >>> f = EnergyMLP(latent_dims=(2, 2, 2, 10), hidden=50, depth=4, spectral_norm=True)
        >>> f([torch.randn(3, d) for d in (2, 2, 2, 10)]).shape
        torch.Size([3])

    Source: Cui, Wu, Han, ICCV 2023, section 3.1 (the joint energy); Pang et al., NeurIPS 2020, eq. 2 (one layer);
    Pang and Wu, ICML 2021 (logsumexp and chosen logit).
    """

    def __init__(
        self,
        latent_dims: int | Sequence[int],
        hidden: int | Sequence[int],
        depth: int,
        *,
        activation: str = "leaky_relu",
        negative_slope: float = 0.2,
        out_features: int = 1,
        head: str = "identity",
        spectral_norm: bool | Sequence[bool] = False,
        context_dim: int = 0,
    ) -> None:
        super().__init__()
        dims = _check_dims(latent_dims)
        depth, out_features, context_dim = whole(depth), whole(out_features), whole(context_dim)
        if not isinstance(depth, int) or depth < 1:
            raise ValueError(f"depth must be an integer >= 1, got {depth!r}")
        widths = _entries(hidden) * (depth if isinstance(hidden, numbers.Integral) else 1)
        if len(widths) != depth:
            raise ValueError(f"hidden must be one width or {depth} widths (depth = {depth}), got {hidden!r}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if head not in HEADS:
            raise ValueError(f"head must be one of {', '.join(HEADS)}, got {head!r}")
        if not isinstance(context_dim, int) or context_dim < 0:
            raise ValueError(f"context_dim must be an integer >= 0, got {context_dim!r}")
        if not isinstance(negative_slope, numbers.Real) or not math.isfinite(negative_slope):
            raise ValueError(f"negative_slope must be finite, got {negative_slope!r}")
        parameter = {"leaky_relu": float(negative_slope), "elu": 1.0, "softplus": 1.0}.get(activation, 0.0)
        spec = MLPSpec((sum(dims), *widths, out_features), (activation,) * depth, (parameter,) * depth, head)
        check_spec(spec)
        per_layer = (spectral_norm,) * (depth + 1) if isinstance(spectral_norm, bool) else _entries(spectral_norm)
        if len(per_layer) != depth + 1 or any(not isinstance(normed, bool) for normed in per_layer):
            raise ValueError(f"spectral_norm must be a bool or {depth + 1} bools (depth + 1), got {spectral_norm!r}")
        self._set_up(dims, spec, per_layer, context_dim)

    def _set_up(self, dims: tuple[int, ...], spec: MLPSpec, spectral_norm: tuple[bool, ...], context_dim: int) -> None:
        self.latent_dims = dims
        self.context_dim = context_dim
        self.spec = spec
        self.spectral_norm = spectral_norm[0] if len(set(spectral_norm)) == 1 else spectral_norm
        # out_scale rides along, so that a copied energy of any sign stays what it was
        self._logit_spec = MLPSpec(spec.widths, spec.activations, spec.activation_params, "logit", spec.out_scale)
        ins = (spec.widths[0] + context_dim, *spec.widths[1:-1])
        self.layers = nn.ModuleList(
            EnergyLinear(a, b, spectral_norm=bool(normed))
            for a, b, normed in zip(ins, spec.widths[1:], spectral_norm, strict=True)
        )

    @classmethod
    def from_module(cls, net: nn.Module, latent_dims: int | Sequence[int]) -> EnergyMLP:
        """An EnergyMLP that computes what a recognised module computes, with its own copy of the parameters.

        Args:
            net: a module that `FastLangevin` recognises; spectral norm is folded into the copied weights
            latent_dims: widths of the latent layers; net may take them as a list or side by side

        Raises:
            ValueError: net is not recognised; the message names the layer and the reason.

        Example:
            >>> net = nn.Sequential(nn.Linear(16, 50), nn.GELU(), nn.Linear(50, 1))
            >>> EnergyMLP.from_module(net, 16).spec.widths
            (16, 50, 1)
        """
        from .recognition.examining import Unrecognised, recognise  # recognition knows EnergyMLP
        from .recognition.probing import Probed

        if not isinstance(net, nn.Module):
            raise ValueError(f"net must be a torch.nn.Module, got {describe(net)}")
        dims = _check_dims(latent_dims)
        if type(net) is EnergyMLP and net.latent_dims == dims:
            return copy.deepcopy(net)
        as_tensor = LatentLayout(Tensor, (sum(dims),), ((),))
        found = recognise(net, as_tensor)
        if isinstance(found, Unrecognised) and not isinstance(latent_dims, numbers.Integral):
            found = recognise(net, LatentLayout(list, dims, ((),) * len(dims)))
        if isinstance(found, Unrecognised):
            raise ValueError(f"net cannot be copied into an EnergyMLP: {found.reason}")
        mlp, quadratic = found.mlp() if isinstance(found, Probed) else (found.mlp(), None)
        if quadratic is not None:
            raise ValueError(
                "net cannot be copied into an EnergyMLP: beside its network it holds a Gaussian in z, which "
                "belongs into prior=GaussianPrior(...) of the sampler"
            )
        energy = cls.__new__(cls)
        nn.Module.__init__(energy)
        energy._set_up(dims, mlp.spec, (False,) * len(mlp.weights), 0)
        energy.to(mlp.weights[0].device, mlp.weights[0].dtype)
        with torch.no_grad():
            for layer, weight, bias in zip(energy.layers, mlp.weights, mlp.biases, strict=True):
                layer.weight.copy_(weight)
                if bias is None:
                    layer.bias = None
                else:
                    layer.bias.copy_(bias)
        return energy.train(net.training)

    def forward(
        self, z: Tensor | Sequence[Tensor], context: Tensor | None = None, y: Tensor | int | None = None
    ) -> Tensor:
        """f(z), or f(z, c), [chains]."""
        if torch.jit.is_tracing():
            with quiet_trace():  # the checks look at shapes to refuse what does not fit, and for nothing else
                flat = self._flatten(z)
                return fused_energy.energy(flat, self.mlp(flat, context, y, keep_vectors=self.training))
        flat = self._flatten(z)
        return fused_energy.energy(flat, self.mlp(flat, context, y, keep_vectors=self.training))

    def _flatten(self, z: Tensor | Sequence[Tensor]) -> Tensor:
        if isinstance(z, Tensor):
            flat = z.flatten(1) if z.dim() == 4 and z.shape[2:] == (1, 1) else z
        else:
            self._check_parameters()
            layout = flatten_latents(z)[1]
            if layout.dims != self.latent_dims:
                raise ValueError(f"z must be layers of widths {self.latent_dims}, got {layout.dims}")
            flat = torch.cat([layer.flatten(1) for layer in z], dim=1)
        self.check_z(flat)
        return flat

    def check_z(self, z: Tensor) -> None:
        """z [chains, dim] with the dtype and device of the parameters."""
        weight = self._check_parameters()
        fits = is_dense(z) and z.dim() == 2 and z.shape[1] == self.spec.dim
        if not fits or z.dtype != weight.dtype or z.device != weight.device:
            raise ValueError(
                f"z must be [chains, {self.spec.dim}] {dtype_name(weight.dtype)} on {weight.device}, got {describe(z)}"
            )

    def _check_parameters(self) -> Tensor:
        """The first weight; its dtype is one that the operations take."""
        (weight,) = _own((self._modules["layers"]._modules["0"],), "weight")
        if weight.dtype not in SUPPORTED_DTYPES:
            raise ValueError(f"parameters of the energy must be float32 or float64, got {dtype_name(weight.dtype)}")
        return weight

    def mlp(
        self,
        z: Tensor | None,
        context: Tensor | None = None,
        y: Tensor | int | None = None,
        *,
        keep_vectors: bool = False,
    ) -> MLP:
        """The parameters of this moment as the operations take them; attached to autograd unless grad mode is off.

        z is what a context and a chosen logit have to fit. keep_vectors writes the converged singular vectors of a
        spectral norm into their buffers.
        """
        layers = tuple(self._modules["layers"]._modules.values())  # without nn.Module's slow attribute access
        weights = effective_weights(layers, keep_vectors=keep_vectors)
        biases = tuple(_own(layers, "bias"))
        context_bias = None
        if self.context_dim:
            context_bias = F.linear(self._check_context(context, z), weights[0][:, self.spec.dim :])
            weights[0] = weights[0][:, : self.spec.dim].contiguous()
        elif context is not None:
            raise ValueError("context was given to an EnergyMLP with context_dim = 0")
        if y is None:
            if self.spec.head == "logit":
                raise ValueError("y must name a logit: this EnergyMLP has head 'logit'")
            return MLP(self.spec, tuple(weights), biases, context_bias)
        return MLP(self._logit_spec, tuple(weights), biases, context_bias, self._check_logit(y, z))

    def parameters_as_they_are(self) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]] | None:
        """(weights, biases), the very parameters, where the layers are nothing but them: no norm, hook or
        parametrisation; otherwise None."""
        weights, biases = [], []
        for layer in self._modules["layers"]._modules.values():
            parameters = layer._parameters
            if (
                type(layer) is not EnergyLinear  # a parametrised layer is of a class of its own
                or layer.spectral_norm
                or _is_hooked(layer)
                or "weight" not in parameters
            ):
                return None
            weights.append(parameters["weight"])
            biases.append(parameters.get("bias"))
        return tuple(weights), tuple(biases)

    def _check_context(self, context: Tensor | None, z: Tensor) -> Tensor:
        chains = z.shape[0]
        shapes = ((self.context_dim,), (chains, self.context_dim))
        if (
            not isinstance(context, Tensor)
            or tuple(context.shape) not in shapes
            or context.dtype != z.dtype
            or context.device != z.device
        ):
            raise ValueError(
                f"context must be [{chains}, {self.context_dim}] or [{self.context_dim}] {dtype_name(z.dtype)} on "
                f"{z.device}, got {describe(context)}"
            )
        return context.expand(chains, self.context_dim)

    def _check_logit(self, y: Tensor | int, z: Tensor) -> Tensor:
        n_logits, chains, y = self.spec.n_logits, z.shape[0], whole(y)
        if self.spec.head not in ("logit", "logsumexp"):
            raise ValueError(f"y chooses a logit of a logsumexp or logit head, but this head is {self.spec.head!r}")
        if isinstance(y, int) and not isinstance(y, bool) and 0 <= y < n_logits:
            return torch.full((chains,), y, dtype=torch.int64, device=z.device)
        if (
            not isinstance(y, Tensor)
            or y.dtype != torch.int64
            or tuple(y.shape) != (chains,)
            or y.device != z.device
            or not _name_logits(y, n_logits)
        ):
            got = describe(y) if isinstance(y, Tensor) else repr(y)
            if (
                isinstance(y, Tensor)
                and y.dtype == torch.int64
                and tuple(y.shape) == (chains,)
                and y.device == z.device
            ):
                got += f" from {int(y.min())} to {int(y.max())}"
            raise ValueError(
                f"y must be an int or int64 [{chains}] on {z.device} with entries in [0, {n_logits}), got {got}"
            )
        return y.contiguous()

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        published_checkpoints.rename_keys(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        spec = self.spec
        return (
            f"latent_dims={self.latent_dims}, widths={spec.widths}, activation={spec.activations[0]}, "
            f"head={spec.head}, spectral_norm={self.spectral_norm}, context_dim={self.context_dim}"
        )
