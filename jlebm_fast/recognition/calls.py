"""A call of torch in a forward that is followed, and what is known of the tensor it gives (`following.py`)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .observing import ADDING, JOINING, KEEPING, REARRANGING
from .probing import Place

# fmt: off
NEGATING = frozenset(("neg", "negative"))
MULTIPLYING = frozenset(("mul", "multiply", "rmul", "imul"))
DIVIDING = frozenset(("div", "truediv", "true_divide", "divide", "itruediv"))
# affine in one operand, whatever the others are
PRODUCTS = frozenset((
    "linear", "matmul", "rmatmul", "mm", "bmm", "mv", "addmm", "baddbmm", "addmv", "einsum", "tensordot", "inner",
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
))
MOVING = REARRANGING | KEEPING | {
    "expand", "expand_as", "broadcast_to", "repeat", "tile", "flip", "roll", "sum", "mean", "gather", "take_along_dim",
    "float", "swapaxes", "vstack", "atleast_2d", "diagonal", "cumsum",
}
SMOOTH = frozenset((
    "sigmoid", "tanh", "softplus", "exp", "expm1", "log", "log1p", "erf", "erfc", "square", "pow", "rpow", "reciprocal",
    "rtruediv", "rdiv", "silu", "gelu", "mish", "logsigmoid", "sqrt", "rsqrt", "cosh", "sinh", "logaddexp",
))
SELECTING = frozenset(("gather", "take_along_dim", "getitem"))
# of what may become a Gaussian's logarithm
NORMS = frozenset(("norm", "vector_norm", "linalg_norm", "linalg_vector_norm"))
OF_Z_ALONE = (PRODUCTS | MOVING | SMOOTH | NORMS | ADDING | MULTIPLYING | DIVIDING | NEGATING) - JOINING
# fmt: on
OUT_OF_Z: Place = (-1, 0)
NORM = "norm"


class Seen(NamedTuple):
    """What a tensor is.

    kind         "affine", "elementwise", "reduced", "of z alone", "condition" or "unknown"
    layer        the hidden layer in whose units it is affine; 0: in z
    made         where the tensor is made; of an elementwise one where its activation is
    root         the tensor that it is elementwise a function of
    factor       affine: times its root; reduced: times the logsumexp or the chosen logit
    activation   elementwise: name and parameter where it is known; reduced: the head
    of           elementwise and reduced: the tensor that the activation or head is given
    shift        reduced: added last
    beside       reduced: where functions of z alone are made that were added, and the factor of each
    n_logits     reduced
    chosen       reduced: the call that chose
    via          the calls of numbers that lie between it and its root
    degree       of layer 0 and not affine: as a polynomial in z, whatever the tensors in it hold; NORM of a norm, whose
                 square is of degree 2; None of what is no polynomial by the way it is computed
    why          unknown: in words; of z alone: why it is none of a network's
    """

    kind: str
    layer: int = 0
    made: Place = OUT_OF_Z
    root: Place = OUT_OF_Z
    factor: float = 1.0
    activation: tuple[str, float] | None = None
    of: Place = OUT_OF_Z
    shift: float = 0.0
    beside: tuple[tuple[Place, float], ...] = ()
    n_logits: int = 1
    chosen: int | None = None
    via: tuple[int, ...] = ()
    degree: int | str | None = None
    why: str = ""

    def times(self, factor: float) -> Seen:
        """What a reduced value times a number is."""
        beside = tuple((place, factor * share) for place, share in self.beside)
        return self._replace(factor=factor * self.factor, shift=factor * self.shift, beside=beside)


class Call(NamedTuple):
    """A call of torch, and one of the tensors it gives.

    of_z         those of its arguments that depend on z
    conditions   how many of the others are of the condition
    constants    how many are neither
    """

    name: str
    place: Place
    args: tuple
    kwargs: dict[str, Any]
    of_z: list[tuple[Tensor, Seen]]
    conditions: int
    constants: int
    output: Tensor

    @property
    def with_tensors(self) -> bool:
        """Whether it is of anything but z and numbers."""
        return self.conditions + self.constants > 0

    @property
    def first(self) -> object:
        """The first argument, or what is given as `input`."""
        return self.args[0] if self.args else self.kwargs.get("input")

    @property
    def numbers(self) -> list[float]:
        """Numbers among its positional arguments."""
        return [arg for arg in self.args if isinstance(arg, (int, float))]


def degree_of(call: Call, chains: int) -> int | str | None:
    """`Seen.degree` of what a call makes of affine functions of z and of others of layer 0.

    By the operations alone: of a wall far away, softplus(|z|² - 400), random numbers show nothing.
    """
    name, leaf = call.name, call.of_z[0][0]
    degrees = [1 if seen.kind == "affine" else seen.degree for _, seen in call.of_z]
    if None in degrees or call.kwargs.get("rounding_mode") is not None or call.kwargs.get("out") is not None:
        return None
    first = degrees[0]
    single, norms = len(degrees) == 1, degrees.count(NORM)
    if name == "square" or (name == "pow" and single and call.first is leaf and call.numbers in ([2], [2.0])):
        return {1: 2, NORM: 2}.get(first)
    if name == "pow" and single and call.first is leaf and call.numbers == [1]:
        return first
    if name in NORMS:
        return NORM if single and first == 1 and _is_length(call, leaf, chains) else None
    divides = name in DIVIDING and call.first is leaf
    if single and (name in MOVING | NEGATING | MULTIPLYING or divides):
        return first if not norms or call.output.numel() == leaf.numel() else None
    if norms:
        same = name in MULTIPLYING and len(degrees) == 2 and call.of_z[1][0] is leaf
        return 2 if same else None
    if name in ADDING:
        return max(degrees)
    if name in PRODUCTS or (name in MULTIPLYING and len(degrees) == 2):
        return sum(degrees) if sum(degrees) <= 2 else None
    return None


def _is_length(call: Call, leaf: Tensor, chains: int) -> bool:
    """Whether a norm is the Euclidean one of each chain; of a matrix, or with another p, it is something else."""
    p = call.kwargs.get("p", call.kwargs.get("ord", call.args[1] if len(call.args) > 1 else None))
    if p not in (None, "fro", 2) or call.output.numel() != chains or leaf.shape[:1] != (chains,):
        return False
    lengths = leaf.reshape(chains, -1).square().sum(1).sqrt()
    return torch.allclose(call.output.reshape(-1), lengths, rtol=1e-12, atol=0.0)
