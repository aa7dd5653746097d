"""Reads the structure of an MLP energy out of one run of a module's forward.

A copy of the module runs in float64 on a small random batch, and every torch call it makes is seen by `Tracer`. Each
tensor that descends from z carries a `Label`: how far the network has got, and which feature each of its entries is.
Whatever only rearranges (views, squeezes, cat, indexing) is applied to those entry numbers as well, so any
wrapping is understood, and anything else gives a label that says in which layer which operation was not understood.
A trace is a conjecture: `examining.py` tests it numerically before it is used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..energy import EnergyLinear
from .observing import (
    ADDING,
    DROPOUTS,
    JOINING,
    KEEPING,
    READING,
    REARRANGING,
    ForwardObserver,
    activation_of,
    draws,
    name_of,
)
from .snapshots import MOST_ENTRIES
from .structure import Label, Linear, LinearSite, Untraceable

_OF_PARAMETERS = frozenset(("shape", "size", "dim", "ndim", "numel", "nelement", "len", "dtype", "device"))
_DEFAULTS = {"leaky_relu": 0.01, "elu": 1.0, "softplus": 1.0}
# whoever changed it later would not be noticed
_OF_UNKNOWN_ORIGIN = (
    "{} with the number {!r}, which is neither written in the module's code nor an attribute of it (int or float),"
)


class Tracer(ForwardObserver[Label]):
    """Labels everything that descends from the given latents, and from a condition beside them, while a module runs.

    dim       of the latents; those of the condition follow them in the numbers of entries
    numbers   (int or float, value) of those that may scale a value or shape an activation: their origin is known and
              watched (`examining.py`)
    """

    def __init__(
        self,
        net: nn.Module,
        chains: int,
        dim: int,
        context_dim: int,
        device: torch.device,
        numbers: frozenset[tuple[type, float]],
    ) -> None:
        super().__init__(net)
        self.chains, self.dim, self.device, self.numbers = chains, dim, device, numbers
        self.context_dim = context_dim
        self._owners = {
            id(tensor): (module, path, name)
            for path, module in net.named_modules()
            for name, tensor in module.named_parameters(recurse=False)
        }
        self._normalised: dict[int, tuple[Tensor, str]] = {}  # of an EnergyLinear by its norm: with the layer's path

    def label_of(self, output: object) -> Label:
        """The label of what the module returned.

        Raises:
            Untraceable: the module did what no MLP does, or its output has no label.
        """
        label = self.get(output)
        if self.refused is None and self.unseen_write([output]):
            self.refused = "forward writes into a view of what it returns"
        if self.refused is not None:
            raise Untraceable(self.refused)
        if label is None:
            raise Untraceable("its output is not a tensor that torch operations computed from z")
        if label.unknown is not None:
            raise Untraceable(label.unknown)
        return label

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        inputs = [label for label in map(self.get, leaves) if label is not None]
        name = name_of(func)
        if self.unseen_write(leaves):
            self.refused = self.refused or f"forward writes into a view of what {name} is given in {self.where()}"
        drawn = draws(name, args, kwargs)
        if drawn is not None:
            # before it does: torch's generator is not ours to advance, nor to set back under other threads
            self.refused = self.refused or f"{drawn} in {self.where()}"
            raise Untraceable(self.refused)
        result = func(*args, **kwargs)
        if name in READING and not isinstance(result, Tensor):
            # of a buffer too: what was read would be a constant from then on
            what = "values of z" if inputs else "the value of a tensor"
            self.refused = self.refused or f"forward reads {what} ({name}) in {self.where()}"
        if not inputs:
            self._normalise(name, args, result)
            if self._asks(name, leaves, result) and _is_users_code():
                self.refused = self.refused or f"forward asks a tensor for its {name} in {self.where()}"
            return result
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        misused = self.misuse(name, True, any(label.unknown for label in inputs), result, len(outputs))
        if misused is not None:
            self.refused = self.refused or f"{misused} ({name}) in {self.where()}"
        if not outputs:
            return result
        unknown = next((label for label in inputs if label.unknown), None)
        if unknown is not None:
            for output in outputs:
                self.put(output, unknown)
        elif name in REARRANGING:
            self._rearrange(name, func, args, kwargs, inputs, result)
        else:
            label = self._step(name, func, args, kwargs, inputs, outputs)
            for output in outputs:
                self.put(output, label)
        return result

    def _asks(self, name: str, leaves: list, result: object) -> bool:
        """Whether a call gives no tensor but something about one that may change unseen: all but a parameter's shape,
        type and place."""
        if result is None or any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            return False
        asked = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        of_parameters = name in _OF_PARAMETERS and all(id(leaf) in self._owners for leaf in asked)
        return bool(asked) and not of_parameters

    def _normalise(self, name: str, args: tuple, result: Any) -> None:
        """Remember what an EnergyMLP makes of a weight with a spectral norm; `examining.py` tests that it is that."""
        if (
            name in ("div", "truediv", "true_divide")
            and len(args) == 2
            and isinstance(args[1], Tensor)
            and args[1].dim() == 0
        ):
            module, path, _ = self._owners.get(id(args[0]), (None, "", ""))
            if isinstance(module, EnergyLinear) and module.spectral_norm and args[0] is module._parameters["weight"]:
                self._normalised[id(result)] = (result, path)

    def _unknown(self, what: str) -> Label:
        return Label(unknown=f"{what} in {self.where()}")

    def _rearrange(
        self, name: str, func: Callable[..., Any], args: tuple, kwargs: dict, inputs: list[Label], result: Any
    ) -> None:
        first = inputs[0]
        same = all(label.kind == first.kind for label in inputs)
        # in-place forms would disturb the entries that other tensors still refer to
        entries_of = lambda leaf: leaf if (label := self.get(leaf)) is None else label.entries.clone()  # noqa: E731
        leaves = tree_leaves((args, kwargs))
        leaves += [end for leaf in leaves if isinstance(leaf, slice) for end in (leaf.start, leaf.stop, leaf.step)]
        refused = None
        if not same and name in JOINING and all(map(self._is_summand, inputs)):
            self._join(func, args, kwargs, result)
            return
        if not same:
            refused = f"{name} joins different things"
        elif any(isinstance(leaf, (Tensor, np.ndarray)) and self.get(leaf) is None for leaf in leaves):
            # an index, whose values could change unseen
            refused = f"{name} of z and a tensor that does not come from z"
        elif sum(isinstance(leaf, int) for leaf in leaves) > MOST_ENTRIES:
            refused = f"{name} with more than {MOST_ENTRIES} numbers, too many to watch,"
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if refused is not None:
            for output in outputs:
                self.put(output, self._unknown(refused))
            return
        entries = func(*tree_map(entries_of, args), **tree_map(entries_of, kwargs))
        for output, numbers in zip(outputs, tree_leaves(entries), strict=True):
            self.put(output, first._replace(entries=numbers))

    def _is_summand(self, label: Label) -> bool:
        """Whether it is one number per chain that a sum of networks may take."""
        if label.stacked or label.entries.numel() != self.chains:
            return False
        if not torch.equal(label.entries.reshape(-1), self._in_order(1)[:, 0]):
            return False
        one_logit = label.linears and label.linears[-1].weight.shape[0] == 1
        return bool(label.terms or (one_logit and len(label.post) < len(label.linears)))

    def _join(self, func: Callable[..., Any], args: tuple, kwargs: dict, result: Tensor) -> None:
        """Label networks that are stacked or concatenated, to be added by what follows."""
        terms: list[Label] = []

        def entries_of(leaf: object) -> object:
            label = self.get(leaf)
            if label is None:
                return leaf
            terms.append(label)
            return label.entries + (len(terms) - 1) * self.chains

        entries = func(*tree_map(entries_of, args), **tree_map(entries_of, kwargs))
        self.put(result, Label(entries, terms=tuple(terms), stacked=True))

    def _reduce(
        self, func: Callable[..., Any], label: Label, args: tuple, kwargs: dict, output: Tensor
    ) -> Label | None:
        """The label of a sum or mean over stacked networks; None where it is over anything else."""
        if output.numel() != self.chains:
            return None
        result_of = lambda t: func(*tree_map(lambda x: t if self.get(x) is label else x, args), **kwargs)  # noqa: E731
        shares = [result_of((label.entries // self.chains == t).double()) for t in range(len(label.terms))]
        chains = result_of((label.entries % self.chains).double()) / sum(shares)
        share = float(shares[0].reshape(-1)[0])
        # each network once, its chains where they were
        if any(bool((other != share).any()) for other in shares) or not torch.equal(
            chains.round().long().reshape(-1), self._in_order(1)[:, 0]
        ):
            return None
        return self._sum_of([(term, share * label.factor) for term in label.terms], output)

    def _sum_of(self, scaled: list[tuple[Label, float]], output: Tensor) -> Label:
        """The label of a sum of networks and of sums of such, each with its factor."""
        terms: list[Label] = []
        for label, factor in scaled:
            factor = factor * label.factor
            terms += [inner._replace(factor=inner.factor * factor) for inner in label.terms] or [
                label._replace(factor=factor)
            ]
        return Label(self._in_order(1).view(output.shape), terms=tuple(terms))

    def _added(self, name: str, args: tuple, kwargs: dict, inputs: list[Label], output: Tensor) -> Label:
        numbers = [arg for arg in args if isinstance(arg, (int, float))]
        if len(inputs) == 1 and numbers == [0] and self._known(numbers[0]):  # as sum() starts
            return inputs[0]._replace(factor=-inputs[0].factor) if name == "rsub" else inputs[0]
        if len(inputs) != 2 or kwargs or any(label.entries.numel() != self.chains for label in inputs):
            return self._unknown(f"{name} is not an operation of an MLP")
        if output.numel() != self.chains or not all(map(self._is_summand, inputs)):
            return self._unknown(f"{name} of networks that have more than one logit or a head, or other chains,")
        signs = {"sub": (1.0, -1.0), "subtract": (1.0, -1.0), "rsub": (-1.0, 1.0)}.get(name, (1.0, 1.0))
        return self._sum_of(list(zip(inputs, signs, strict=True)), output)

    def _step(
        self, name: str, func: Callable[..., Any], args: tuple, kwargs: dict, inputs: list[Label], outputs: list[Tensor]
    ) -> Label:
        """The label after an operation that is not a mere rearrangement."""
        label = inputs[0]
        if len(inputs) == 1 and name in KEEPING:
            return label
        if len(inputs) == 1 and name in ("sum", "mean") and label.stacked:
            reduced = self._reduce(func, label, args, kwargs, outputs[0])
            return reduced or self._unknown(f"{name} of something else than all of the networks that were stacked")
        if name in ADDING:
            return self._added(name, args, kwargs, inputs, outputs[0])
        if len(inputs) == 1 and name in ("sum", "mean") and outputs[0].numel() == label.entries.numel():
            return label._replace(entries=label.entries.reshape(outputs[0].shape))
        if name in ("linear", "conv2d") and self.get(args[0]) is label and len(inputs) == 1:
            return self._linear(name, label, args, kwargs)
        if name in DROPOUTS and label.plain:  # not active, or `_draws` would have refused it
            return label
        if name == "logsumexp":
            return self._logsumexp(label, args, kwargs, outputs[0])
        if name in ("neg", "negative", "mul", "multiply", "rmul", "div", "truediv", "true_divide", "divide"):
            return self._scaled(name, label, args, inputs)
        found = activation_of(name, args, kwargs)
        if found is None:
            return self._unknown(f"{name} is not an operation of an MLP")
        if found[1] not in (0.0, _DEFAULTS.get(name)) and not self._known(found[1], written_as_int=True):
            return self._unknown(_OF_UNKNOWN_ORIGIN.format(name, found[1]))
        # tanh is odd: the sign passes through
        fits = label.plain or (found[0] == "tanh" and label.head is None and label.factor == -1.0)
        if len(inputs) != 1 or not fits or not label.linears or len(label.post) == len(label.linears):
            return self._unknown(f"{name} does not follow a linear layer")
        return label._replace(post=(*label.post, found))

    def _known(self, number: float, *, written_as_int: bool = False) -> bool:
        if written_as_int and float(number).is_integer() and (int, number) in self.numbers:
            return True
        return (float if isinstance(number, float) else int, number) in self.numbers

    def _scaled(self, name: str, label: Label, args: tuple, inputs: list[Label]) -> Label:
        if name in ("neg", "negative"):
            return label._replace(factor=-label.factor)
        if len(inputs) == 2 and name in ("mul", "multiply"):
            a, b = sorted(inputs, key=lambda entry: len(entry.post))
            swish = a.plain and b.plain and b.kind == a._replace(post=(*a.post, ("sigmoid", 0.0))).kind
            if swish and torch.equal(a.entries, b.entries):
                return a._replace(post=(*a.post, ("silu", 0.0)))
        numbers = [arg for arg in args if isinstance(arg, (int, float))]
        if len(inputs) != 1 or len(numbers) != 1 or not (label.linears or label.terms):
            return self._unknown(f"{name} with a tensor, or of z itself,")
        if not self._known(numbers[0]):
            return self._unknown(_OF_UNKNOWN_ORIGIN.format(name, numbers[0]))
        return label._replace(factor=label.factor / numbers[0] if "div" in name else label.factor * numbers[0])

    def _logsumexp(self, label: Label, args: tuple, kwargs: dict, output: Tensor) -> Label:
        n_logits = label.linears[-1].weight.shape[0] if label.linears else 0
        if not label.plain or len(label.post) == len(label.linears) or output.numel() != self.chains:
            return self._unknown("logsumexp of something that is not the logits")
        if not torch.equal(label.entries.reshape(self.chains, n_logits), self._in_order(n_logits)):
            return self._unknown("logsumexp of rearranged logits")
        return label._replace(
            head="logsumexp", entries=torch.arange(self.chains, device=self.device).view(output.shape)
        )

    def _in_order(self, n_features: int) -> Tensor:
        return torch.arange(self.chains * n_features, device=self.device).view(self.chains, n_features)

    def _linear(self, name: str, label: Label, args: tuple, kwargs: dict) -> Label:
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        weight, bias = given["weight"], given.get("bias")
        if not label.plain:
            return self._unknown("a linear layer of a scaled or reduced value")
        if name == "conv2d":
            if tuple(weight.shape[2:]) != (1, 1) or given["input"].shape[2:] != (1, 1) or weight.dim() != 4:
                return self._unknown("a convolution other than 1 x 1 on 1 x 1")
            weight = weight.flatten(1)
        entries = label.entries
        if entries.numel() != self.chains * weight.shape[1]:
            return self._unknown("a linear layer that is not applied to one row per chain")
        entries = entries.reshape(self.chains, weight.shape[1])
        width = label.linears[-1].weight.shape[0] if label.linears else self.dim + self.context_dim
        shift = (torch.arange(self.chains, device=self.device) * width).view(-1, 1)
        if not torch.equal(entries - shift, entries[:1].expand_as(entries)):
            return self._unknown("a linear layer that mixes chains")
        if label.linears and not torch.equal(entries, self._in_order(width)):
            return self._unknown("a linear layer of rearranged or selected features")
        post = label.post
        if label.linears and len(post) < len(label.linears):
            post = (*post, ("identity", 0.0))
        elif post and post[-1][0] == "sigmoid":
            return self._unknown("sigmoid between linear layers")
        site = self._site(given["weight"], bias)
        if isinstance(site, str):
            return self._unknown(site)
        linear = Linear(site, weight.detach(), None if bias is None else bias.detach())
        shape = (self.chains, weight.shape[0]) if name == "linear" else (self.chains, weight.shape[0], 1, 1)
        columns = label.columns if label.linears else tuple(entries[0].tolist())
        return Label(self._in_order(weight.shape[0]).view(shape), (*label.linears, linear), post, columns)

    def _site(self, weight: Tensor, bias: Tensor | None) -> LinearSite | str:
        """Where the parameters come from, or why that is not known."""
        bias_path, bias_name = "", None
        if bias is not None:
            if id(bias) not in self._owners:
                return "a linear layer whose bias is not a parameter"
            _, bias_path, bias_name = self._owners[id(bias)]
        owner = self._owners.get(id(weight))
        if owner is not None:
            return LinearSite(owner[1], "parameter", owner[2], bias_path, bias_name)
        if id(weight) in self._normalised:
            return LinearSite(self._normalised[id(weight)][1], "spectral", "weight", bias_path, bias_name)
        path, module = self.stack[-1] if self.stack else ("", self.net)
        kind = computed_weight_kind(module)
        if kind is None:
            return "a weight that is computed in a way we do not know"
        return LinearSite(path, kind, "weight", bias_path, bias_name)


def _is_users_code() -> bool:
    """Whether the call that is being looked at stands in code that is not torch's."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") in ("torch.overrides", __name__):
        frame = frame.f_back
    return frame is not None and not frame.f_globals.get("__name__", "").startswith("torch")


def computed_weight_kind(module: nn.Module) -> str | None:
    """How `module.weight` comes about where it is no plain parameter; None where that is not known."""
    from torch.nn.utils.parametrizations import _SpectralNorm
    from torch.nn.utils.spectral_norm import SpectralNorm
    from torch.nn.utils.weight_norm import WeightNorm

    hooks = [hook for hook in module._forward_pre_hooks.values() if getattr(hook, "name", None) == "weight"]
    if len(hooks) == 1 and isinstance(hooks[0], SpectralNorm):
        return "spectral" if hooks[0].dim == 0 else None
    if len(hooks) == 1 and isinstance(hooks[0], WeightNorm):
        return "weight_norm"
    if nn.utils.parametrize.is_parametrized(module, "weight"):
        chain = module.parametrizations.weight
        spectral = [p for p in chain if isinstance(p, _SpectralNorm)]
        if not spectral:
            return "parametrized" if not list(chain.buffers()) else None
        return "spectral" if len(chain) == 1 and spectral[0].dim == 0 else None
    return None
