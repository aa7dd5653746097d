"""What the four operations receive: plain records, checked once at the door, identical for every backend.

    f(z)   = out_scale * head(logits),      logits = W_out h_L + b_out,   h_l = phi_l(W_l h_{l-1} + b_l),   h_0 = z
    update   z <- z + c_grad * grad + c_prior * ((mean - z) * precision + extra_grad) + c_noise * eps

No step size appears here: `dynamics.py` turns step sizes and noise scales into the three coefficients.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

ACTIVATIONS = ("identity", "leaky_relu", "relu", "gelu", "gelu_tanh", "silu", "mish", "tanh", "softplus", "elu")
HEADS = ("identity", "tanh", "sigmoid", "softplus", "logsumexp", "logit")
MAX_HIDDEN_LAYERS = 16
_ROWS_AT_ONCE = 1024  # of step coefficients that are cut into steps


@dataclasses.dataclass(frozen=True)
class MLPSpec:
    """Shape and constants of an energy MLP, without its weights; hashable.

    widths              (dim, H_1, …, H_L, J): input, hidden and logit widths, L >= 1
    activations         phi_1 … phi_L, names from `ACTIVATIONS`
    activation_params   one float per hidden layer: negative slope of leaky_relu, alpha of elu, beta of softplus, else 0
    head                from `HEADS`; identity, tanh, sigmoid and softplus take J = 1;
                        logsumexp takes J >= 1; logit picks one logit per chain
    out_scale           f = out_scale * head(logits)
    text                all but out_scale in one word per layer, as registered operators take it
    """

    widths: tuple[int, ...]
    activations: tuple[str, ...]
    activation_params: tuple[float, ...]
    head: str = "identity"
    out_scale: float = 1.0
    # made with the record, not when first asked for: a compiler then reads it as the constant it is
    text: str = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        layers = [f"{name}:{float(value)!r}" for name, value in zip(self.activations, self.activation_params)]
        object.__setattr__(self, "text", " ".join(["-".join(map(str, self.widths)), *layers, self.head]))

    @staticmethod
    def of_text(text: str, out_scale: float) -> MLPSpec:
        """The spec with that `text`.

        >>> MLPSpec.of_text("16-50-1 leaky_relu:0.2 identity", 1.0) == MLPSpec((16, 50, 1), ("leaky_relu",), (0.2,))
        True

        Raises:
            ValueError: the text is no spec.
        """
        try:
            widths, *layers, head = text.split()
            if ":" in head:
                raise ValueError(head)
            names, values = zip(*[layer.split(":") for layer in layers])
            return MLPSpec(tuple(map(int, widths.split("-"))), names, tuple(map(float, values)), head, out_scale)
        except ValueError:
            raise ValueError(
                "spec must be widths, activation:parameter of each hidden layer and head, as in "
                f"'16-50-1 leaky_relu:0.2 identity', got {text!r}"
            ) from None

    @property
    def dim(self) -> int:
        return self.widths[0]

    @property
    def n_hidden(self) -> int:
        return len(self.widths) - 2

    @property
    def n_logits(self) -> int:
        return self.widths[-1]

    @functools.cached_property
    def weight_shapes(self) -> tuple[tuple[int, int], ...]:
        """[out, in] of the L + 1 weights."""
        return tuple(zip(self.widths[1:], self.widths))

    @functools.cached_property
    def bias_shapes(self) -> tuple[tuple[int], ...]:
        """[out] of the L + 1 biases."""
        return tuple((n_out,) for n_out in self.widths[1:])

    @functools.cached_property
    def widest(self) -> int:
        """The largest of the widths."""
        return max(self.widths)

    @functools.cached_property
    def native_fields(self) -> tuple[tuple[int, ...], list[int], tuple[float, ...], int, float]:
        """What native kernels are told of it, in the order of `csrc/bindings_records.h`: names by their place above."""
        codes = [ACTIVATIONS.index(name) for name in self.activations]
        return self.widths, codes, self.activation_params, HEADS.index(self.head), self.out_scale

    @functools.cached_property
    def negated(self) -> MLPSpec:
        """The spec of −f."""
        return dataclasses.replace(self, out_scale=-self.out_scale)

    @property
    def flops_per_chain_step(self) -> int:
        """Multiply-adds of one forward and one input gradient, counted as two operations each."""
        return 4 * sum(a * b for a, b in zip(self.widths, self.widths[1:]))


class MLP(NamedTuple):
    """An energy MLP ready to run: its spec and the effective (normalised, detached) parameters of this very call.

    weights        L + 1 tensors [out, in], contiguous
    biases         L + 1 tensors [out] or None
    context_bias   [chains, H_1] or None: added to the first layer's pre-activation, constant along a chain
    logit          [chains] int64 or None: the logit each chain follows, for head "logit"
    """

    spec: MLPSpec
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    context_bias: Tensor | None = None
    logit: Tensor | None = None


class Update(NamedTuple):
    """All of a Langevin update except the gradient.

    step_coefficients    [n_steps, 3]: (c_grad, c_prior, c_noise) of each step, dtype of z
    chain_coefficients   [chains, 3] or None: factors multiplied onto the step's coefficients, per chain
    prior_mean           [dim] or [chains, dim] or None (zero)
    prior_precision      [dim] or [chains, dim] or None (no prior term): 1 / std²
    frozen               bool [dim] or [chains, dim] or None; True keeps a coordinate as it is
    noise                [n_steps, chains, dim] or None: eps from outside instead of the noise contract's
    noise_key            unsigned 64-bit integer; or its 64 bits in an int64 tensor [1], on the CPU or on z's device
    first_step           index of the first step in the noise field
    first_chain          index of the first chain in the noise field
    extra_grad           [chains, dim] or None: gradient of a log-likelihood, constant over the call (n_steps is 1 then)
    """

    step_coefficients: Tensor
    chain_coefficients: Tensor | None = None
    prior_mean: Tensor | None = None
    prior_precision: Tensor | None = None
    frozen: Tensor | None = None
    noise: Tensor | None = None
    noise_key: int | Tensor = 0
    first_step: int = 0
    first_chain: int = 0
    extra_grad: Tensor | None = None

    def at_step(self, step: int) -> Update:
        """Step number `step` of this update as an update of one step; counters wrap at 2**32."""
        return self._replace(
            step_coefficients=self.step_coefficients[step : step + 1],
            noise=None if self.noise is None else self.noise[step : step + 1],
            first_step=(self.first_step + step) % (1 << 32),
        )

    def steps(self, n_steps: int) -> Iterator[Update]:
        """`at_step` of all steps, one after the other; the rows are cut many in one go."""
        _, chains, mean, precision, frozen, noise, key, first_step, first_chain, extra_grad = self
        for begin in range(0, n_steps, _ROWS_AT_ONCE):
            rows = self.step_coefficients[begin : begin + _ROWS_AT_ONCE].split(1)
            noises = (None,) * len(rows) if noise is None else noise[begin : begin + _ROWS_AT_ONCE].split(1)
            for k, row in enumerate(rows, begin):
                step = (first_step + k) % (1 << 32)
                eps = noises[k - begin]
                yield Update(row, chains, mean, precision, frozen, eps, key, step, first_chain, extra_grad)

    def with_gradient(self, extra_grad: Tensor | None) -> Update:
        """The update with another extra gradient."""
        return Update(*self[:-1], extra_grad)


class Record(NamedTuple):
    """What a chain keeps besides its end: steps k with (k + 1) % thin == 0, so n_kept = n_steps // thin."""

    diagnostics: bool = False
    trajectory: bool = False
    thin: int = 1


class ChainResult(NamedTuple):
    """End of a chain and what was recorded; unrequested fields are None.

    z                [chains, dim] after the last step
    energy           [n_kept, chains] f at the point where step k's gradient was taken (before its update)
    grad_norm        [n_kept, chains] Euclidean norm of the gradient used there: ∇f plus extra_grad, without the prior
    displacement     [n_kept, chains] Euclidean length of step k's move
    first_bad_step   [chains] int64, index (counted from first_step) of the first step that left z not finite, or -1
    trajectory       [n_kept, chains, dim] z after step k
    """

    z: Tensor
    energy: Tensor | None = None
    grad_norm: Tensor | None = None
    displacement: Tensor | None = None
    first_bad_step: Tensor | None = None
    trajectory: Tensor | None = None
