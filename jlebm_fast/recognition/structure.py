"""What a trace finds: labels of the tensors on the way, and the structure behind the label of the last one."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from ..problem import MLPSpec

# units of a layer that a sum of networks may have together: its terms run side by side as one network, whose weights
# between terms are zeros that cost as much as others
WIDEST_SUM = 511


@dataclasses.dataclass(frozen=True)
class LinearSite:
    """Where a linear layer's parameters are found again: owner module (path) and parameter names.

    kind   "parameter": read as it is; "spectral" (old or new style, or an EnergyMLP's own): divided by its converged
           spectral norm; "weight_norm": the old style's hook computes it; "parametrized": the attribute computes it,
           without state
    """

    path: str
    kind: str
    weight: str
    bias_path: str
    bias: str | None


@dataclasses.dataclass(frozen=True)
class Term:
    """One network of an energy that is a sum of such, or all of the energy.

    sites      of its layers, in their order
    columns    coordinate of (z, context) behind each input of its first layer; None: z in order
    scale      that the sum takes it with; 1 where it is all of the energy
    """

    sites: tuple[LinearSite, ...]
    columns: tuple[int, ...] | None
    scale: float = 1.0

    def columns_on(self, device: torch.device) -> Tensor | None:
        """The columns as an index."""
        return None if self.columns is None else torch.tensor(self.columns, device=device)


@dataclasses.dataclass(frozen=True)
class Structure:
    """All of a recognised module except its parameters: hashable, comparable."""

    spec: MLPSpec  # of all terms side by side
    terms: tuple[Term, ...]
    context_dim: int = 0  # coordinates of the condition, which follow those of z


class Untraceable(Exception):
    """Why a module is no MLP, in words for the user."""


class Raising(Untraceable):
    """Its forward raised on latents of such widths."""


class Linear(NamedTuple):
    """A linear layer met on the way: where it is, and the very tensors it used."""

    site: LinearSite
    weight: Tensor
    bias: Tensor | None


class Label(NamedTuple):
    """What a tensor holds.

    entries   int64, shape of the tensor: chain * n_features + feature
    linears   the layers passed so far
    post      (activation, parameter) applied after the last of them, one entry per layer but possibly the last
    columns   which coordinate of (z, context) each input of the first layer is
    head      "logsumexp" once reduced
    factor    scale applied since
    terms     the networks that were added; all above but entries and factor is empty then
    stacked   they stand beside each other, not yet added: an entry is term * chains + chain
    unknown   why this is nothing we know; the rest is meaningless then
    """

    entries: Tensor | None = None
    linears: tuple[Linear, ...] = ()
    post: tuple[tuple[str, float], ...] = ()
    columns: tuple[int, ...] = ()
    head: str | None = None
    factor: float = 1.0
    terms: tuple[Label, ...] = ()
    stacked: bool = False
    unknown: str | None = None

    @property
    def plain(self) -> bool:
        """Unscaled and unreduced: something a layer or an activation may take."""
        return self.head is None and self.factor == 1.0 and not self.terms

    @property
    def kind(self) -> tuple:
        """What it is apart from its entries, to be compared; tensors stand for the places they come from."""
        sites = tuple(linear.site for linear in self.linears)
        terms = tuple(term.kind for term in self.terms)
        return sites, self.post, self.columns, self.head, self.factor, terms, self.stacked


def structure_of(label: Label, chains: int, dim: int, context_dim: int) -> tuple[Structure, tuple[Linear, ...]]:
    """The structure behind the label of a module's output for so many chains, and the layers of all its terms with the
    tensors they used.

    Raises:
        Untraceable: it is none that the operations take.
    """
    if label.stacked:
        raise Untraceable("it returns the values of several networks one by one, not their sum")
    labels = label.terms or (label,)
    if any(len(part.linears) < 2 for part in labels):
        raise Untraceable("it has no hidden layer")
    head = "identity" if label.terms else _head_of(label)
    if label.entries.numel() != chains:
        raise Untraceable(f"it returns {label.entries.numel()} values for {chains} chains")
    if not torch.equal(label.entries.reshape(-1), torch.arange(chains, device=label.entries.device)):
        raise Untraceable("its output is not in the order of the chains")
    hidden = labels[0].post[: len(labels[0].linears) - 1]
    if any(part.post[: len(part.linears) - 1] != hidden for part in labels):
        raise Untraceable("it is a sum of networks that differ in the number of layers or in the activations")
    widths = [sum(part.linears[i].weight.shape[0] for part in labels) for i in range(len(hidden))]
    if label.terms and max(widths) > WIDEST_SUM:
        raise Untraceable(
            f"it is a sum of networks with {max(widths)} units side by side, where more than {WIDEST_SUM} would cost "
            "more than they save"
        )
    spec = MLPSpec(
        (dim, *widths, 1 if label.terms else label.linears[-1].weight.shape[0]),
        tuple(name for name, _ in hidden),
        tuple(parameter for _, parameter in hidden),
        head,
        label.factor,
    )
    terms = []
    for part in labels:
        in_order = part.columns == tuple(range(dim)) and context_dim == 0
        sites = tuple(linear.site for linear in part.linears)
        terms.append(Term(sites, None if in_order else part.columns, part.factor if label.terms else 1.0))
    linears = tuple(linear for part in labels for linear in part.linears)
    return Structure(spec, tuple(terms), context_dim), linears


def _head_of(label: Label) -> str:
    """The head of a single network."""
    if label.head is not None:
        return label.head
    n_logits = label.linears[-1].weight.shape[0]
    head, parameter = label.post[-1] if len(label.post) == len(label.linears) else ("identity", 0.0)
    if head not in ("identity", "tanh", "sigmoid", "softplus") or (head == "softplus" and parameter != 1.0):
        raise Untraceable(f"its last layer is followed by {head}, which is no output form")
    if n_logits != 1:
        raise Untraceable(f"it returns {n_logits} logits per chain without a head (logsumexp)")
    return head
