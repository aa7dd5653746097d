"""A module known to be an MLP: where its layers are found again, and their weights at the moment of a call.

No parameter is kept, only where it stands. Spectral norm at call time follows `spectral.py`.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..energy import EnergyLinear
from ..modes import capturing, chain_mode
from ..problem import MLP, MLPSpec
from ..spectral import TopSingular, top_singulars
from .structure import LinearSite, Structure

_CPU = torch.device("cpu")


class Layer:
    """A linear layer of the user's module, found again at every call; keeps where power iterations ended, no weight."""

    def __init__(self, net: nn.Module, site: LinearSite) -> None:
        self.kind, self.path = site.kind, site.path
        self.owner = weakref.ref(net.get_submodule(site.path))
        self.bias_owner = weakref.ref(net.get_submodule(site.bias_path))
        self.weight_name, self.bias_name = site.weight, site.bias
        self.direction: Tensor | None = None

    def bias(self) -> Tensor | None:
        """The bias of this moment."""
        return None if self.bias_name is None else _apart(self.bias_owner()._parameters[self.bias_name])

    def original_and_start(self) -> tuple[Tensor, Tensor]:
        """Of a spectral norm: the weight [out, in] before it, and where its power iterations may start."""
        original, u = _original_and_vector(self.owner())
        start = self.direction
        if start is None or start.shape != u.shape or start.dtype != u.dtype or start.device != u.device:
            start = u
        # what a CUDA graph reads must stay where it is
        return original.detach().flatten(1), u if capturing(u.device) else start

    def vector_names(self) -> tuple[str, str]:
        """The names of a spectral norm's buffers (u, v) in the module."""
        prefix = f"{self.path}." if self.path else ""
        if "parametrizations" in self.owner()._modules:
            return f"{prefix}parametrizations.weight.0._u", f"{prefix}parametrizations.weight.0._v"
        return f"{prefix}weight_u", f"{prefix}weight_v"


def converged_buffers(layers: Sequence[Layer]) -> dict[str, Tensor]:
    """The buffers (u, v) of spectral norms as they would be after enough power iterations, by their names."""
    normed = [layer for layer in layers if layer.kind == "spectral"]
    found = {}
    for layer, top in zip(normed, _tops(normed), strict=True):
        found |= zip(layer.vector_names(), (top.u, top.v), strict=True)
    return found


def _tops(normed: Sequence[Layer]) -> list[TopSingular]:
    tops = top_singulars([layer.original_and_start() for layer in normed])
    for layer, top in zip(normed, tops, strict=True):
        if not capturing(top.u.device):
            layer.direction = top.u
    return tops


def _original_and_vector(module: nn.Module) -> tuple[Tensor, Tensor]:
    """The weight before a spectral norm, and the left singular vector that the module keeps of it."""
    if "parametrizations" in module._modules:
        chain = module._modules["parametrizations"].weight
        return chain.original, chain[0]._u
    name = "weight" if isinstance(module, EnergyLinear) else "weight_orig"
    return module._parameters[name], module._buffers["weight_u"]


def effective_weights(layers: Sequence[Layer]) -> list[Tensor]:
    """W of each layer, or what its normalisation makes of it, [out, in]; never touches a module's buffers."""
    weights = [_plain_weight(layer) for layer in layers]
    normed = [i for i, weight in enumerate(weights) if weight is None]
    for i, top in zip(normed, _tops([layers[i] for i in normed]), strict=True):
        weights[i] = top.normalised
    return [_apart(weight if weight.dim() == 2 else weight.flatten(1)) for weight in weights]


def _apart(tensor: Tensor) -> Tensor:
    """The tensor for use outside autograd: where autograd is off, as in a chain, itself."""
    return tensor.detach() if torch.is_grad_enabled() else tensor


def _plain_weight(layer: Layer) -> Tensor | None:
    """The effective weight; None of a spectral norm."""
    module = layer.owner()
    if layer.kind == "parameter":
        return module._parameters[layer.weight_name]
    if layer.kind == "parametrized":
        return module.weight
    if layer.kind == "weight_norm":
        (hook,) = (h for h in module._forward_pre_hooks.values() if getattr(h, "name", None) == "weight")
        return hook.compute_weight(module)
    return None


class Recognised:
    """A module known to be an MLP, or a sum of such: its structure, and how to read its parameters."""

    def __init__(self, net: nn.Module, structure: Structure) -> None:
        self.structure = structure
        self.spec, self.terms, self.context_dim = structure.spec, structure.terms, structure.context_dim
        self.layers = [Layer(net, site) for term in structure.terms for site in term.sites]
        terms = [
            (tuple([(s.path, s.kind, s.weight, s.bias_path, s.bias) for s in term.sites]), term.columns, term.scale)
            for term in structure.terms
        ]
        self.plain = (structure.spec, tuple(terms))
        self._places = self._parameter_places()
        places = [] if self._places is None else [*self._places[0], *self._places[1]]
        read = {id(owner()._parameters[name]) for owner, name in places if name is not None}
        # `plain_mlp` gives all of them as they are to a kernel, which takes none of another shape
        self.shapes_are_compared = all(id(parameter) in read for parameter in net.parameters())
        self._columns: dict[torch.device, list[Tensor | None]] = {}  # made once: a copy to a GPU waits for it

    def _parameter_places(self) -> tuple[list[tuple], list[tuple]] | None:
        """(weakly the owner, name) of each weight and bias, where the net is nothing but its parameters."""
        if len(self.terms) > 1 or self.terms[0].columns is not None:
            return None
        if any(layer.kind != "parameter" for layer in self.layers):
            return None
        weights = [(layer.owner, layer.weight_name) for layer in self.layers]
        if any(owner()._parameters[name].dim() != 2 for owner, name in weights):
            return None
        return weights, [(layer.bias_owner, layer.bias_name) for layer in self.layers]

    def plain_mlp(self, sign: float) -> MLP:
        """`mlp`, whose tensors may still be attached to autograd, and strided as they like."""
        if self._places is None:
            with chain_mode(_CPU):
                return self.mlp(sign)
        weights, biases = self._places
        spec = self.spec if sign == 1.0 else self.spec.negated
        return MLP(
            spec,
            tuple([owner()._parameters[name] for owner, name in weights]),
            tuple([None if name is None else owner()._parameters[name] for owner, name in biases]),
        )

    def mlp(self, sign: float = 1.0, context: Tensor | None = None) -> MLP:
        """The energy times sign under a condition [chains, context_dim], with the parameters of this moment."""
        weights = effective_weights(self.layers)
        biases = [layer.bias() for layer in self.layers]
        device = weights[0].device
        if device not in self._columns:
            self._columns[device] = [term.columns_on(device) for term in self.terms]
        terms = [(columns, term.scale) for columns, term in zip(self._columns[device], self.terms, strict=True)]
        return assembled(self.spec if sign == 1.0 else self.spec.negated, terms, weights, biases, context)

    @property
    def norms(self) -> list[Layer]:
        """The layers whose weights are divided by their spectral norm."""
        return [layer for layer in self.layers if layer.kind == "spectral"]

    @property
    def n_terms(self) -> int:
        """Of how many networks it is the sum."""
        return len(self.terms)


def assembled(
    spec: MLPSpec,
    terms: Sequence[tuple[Tensor | None, float]],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    context: Tensor | None = None,
) -> MLP:
    """One network of the layers of all terms, which follow each other in `weights` [out, in] and `biases`.

    terms      columns, as int64 on the weights' device, and scale of each (`structure.Term`)
    context    [chains, context_dim] or None

    Of several terms the layers stand side by side: W_1 below each other, W_2 … W_L as blocks of a diagonal, the last
    ones in a row, each times its scale.
    """
    n_layers = spec.n_hidden + 1
    context_dim = 0 if context is None else context.shape[1]
    weights, firsts, of_context = list(weights), [], []
    for number, (columns, _) in enumerate(terms):
        first = weights[number * n_layers]
        if columns is not None:
            first, beside = spread_columns(first, columns, spec.dim, context_dim)
            of_context.append(beside)
        firsts.append(first)
    context_bias = None
    if context is not None:
        context_bias = context.detach().to(firsts[0].dtype) @ torch.cat(of_context).t()
    if len(terms) == 1:
        weights[0] = firsts[0]
        return MLP(spec, tuple([w.contiguous() for w in weights]), tuple(biases), context_bias)
    scales = [scale for _, scale in terms]
    middle = [torch.block_diag(*weights[i::n_layers]) for i in range(1, n_layers - 1)]
    last = torch.cat([scale * w for scale, w in zip(scales, weights[n_layers - 1 :: n_layers], strict=True)], 1)
    together = [_joined_biases(biases[i::n_layers], weights[i::n_layers]) for i in range(n_layers - 1)]
    offsets = [s * b for s, b in zip(scales, biases[n_layers - 1 :: n_layers], strict=True) if b is not None]
    return MLP(
        spec,
        (torch.cat(firsts), *middle, last),
        (*together, torch.stack(offsets).sum(0) if offsets else None),
        context_bias,
    )


def _joined_biases(biases: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Tensor | None:
    """The biases of one layer of all terms, zeros where a term has none; None if none has any."""
    if all(bias is None for bias in biases):
        return None
    pairs = zip(biases, weights, strict=True)
    return torch.cat([weight.new_zeros(weight.shape[0]) if bias is None else bias for bias, weight in pairs])


def spread_columns(weight: Tensor, index: Tensor, dim: int, context_dim: int = 0) -> tuple[Tensor, Tensor]:
    """The weights [out, dim] and [out, context_dim] on all of z and of a condition c that together do what `weight`
    [out, inputs] does on (z, c)[:, index]."""
    spread = weight.new_zeros(weight.shape[0], dim + context_dim).index_add_(1, index, weight.detach())
    return spread[:, :dim], spread[:, dim:]
