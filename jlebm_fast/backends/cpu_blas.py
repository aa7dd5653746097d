"""MLP energies with layers too wide for a core's cache: torch's matrix products, batched over chains.

Around them the compiled kernels: phi and phi' of a layer in one pass, the Langevin update with its noise in another.
Chains go in groups, so that memory beyond input and output stays below `_WORKSPACE_FLOATS` however many there are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..problem import ACTIVATIONS, MLP, ChainResult, Record, Update
from . import _native
from .eager import head_value_and_slope

_WORKSPACE_FLOATS = 8 << 20  # 32 MB
_ACTIVATION_CODE = {name: code for code, name in enumerate(ACTIVATIONS)}


class _WideMLP:
    """Gradient evaluations of one MLP on groups of up to `chains` chains, buffers allocated once."""

    def __init__(self, mlp: MLP, chains: int):
        hidden = mlp.spec.widths[1:-1]
        floats_per_chain = 2 * max(hidden) + sum(hidden) + 2 * mlp.spec.dim
        self.group = max(1, min(chains, _WORKSPACE_FLOATS // floats_per_chain))
        self._mlp = mlp
        self._native = _native.load()
        self._pre = [torch.empty(self.group * max(hidden), device="cpu") for _ in range(2)]
        self._slope = [torch.empty(self.group * width, device="cpu") for width in hidden]

    def energy_grad(self, z: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """f [n] and its gradient [n, dim] at z [n, dim], the chains from index `first` on."""
        mlp, n = self._mlp._replace(**self._rows(first, z.shape[0])), z.shape[0]
        spec = mlp.spec
        h, slopes = z, []
        for layer, (name, parameter) in enumerate(zip(spec.activations, spec.activation_params, strict=True)):
            width = spec.widths[layer + 1]
            a = self._pre[layer % 2][: n * width].view(n, width)
            weight_t, bias = mlp.weights[layer].t(), mlp.biases[layer]
            if bias is None:
                torch.mm(h, weight_t, out=a)
            else:
                torch.addmm(bias, h, weight_t, out=a)
            if layer == 0 and mlp.context_bias is not None:
                a.add_(mlp.context_bias)
            slope = self._slope[layer][: n * width].view(n, width)
            self._native.cpu_mlp_activation(
                activation=_ACTIVATION_CODE[name],
                param=parameter,
                n=a.numel(),
                a=a.data_ptr(),
                h=a.data_ptr(),
                d=slope.data_ptr(),
                n_threads=torch.get_num_threads(),
            )
            slopes.append(slope)
            h = a
        logits = (
            h @ mlp.weights[-1].t() if mlp.biases[-1] is None else torch.addmm(mlp.biases[-1], h, mlp.weights[-1].t())
        )
        energy, delta = head_value_and_slope(mlp, logits)
        for layer in reversed(range(spec.n_hidden)):
            width = spec.widths[layer + 1]
            into = self._pre[layer % 2][: n * width].view(n, width)
            delta = torch.mm(delta, mlp.weights[layer + 1], out=into).mul_(slopes[layer])
        return energy, delta @ mlp.weights[0]

    def _rows(self, first: int, n: int) -> dict[str, Tensor | None]:
        rows = {"context_bias": self._mlp.context_bias, "logit": self._mlp.logit}
        return {name: None if t is None else t[first : first + n] for name, t in rows.items()}


@torch.no_grad()
def mlp_energy_grad(z: Tensor, mlp: MLP) -> tuple[Tensor, Tensor]:
    """f(z) [chains] and its gradient [chains, dim]."""
    energy, grad = z.new_empty(z.shape[0]), torch.empty_like(z)
    wide = _WideMLP(mlp, z.shape[0])
    for first in range(0, z.shape[0], wide.group):
        rows = slice(first, first + wide.group)
        energy[rows], grad[rows] = wide.energy_grad(z[rows], first)
    return energy, grad


@torch.no_grad()
def mlp_langevin_chain(
    z: Tensor,
    mlp: MLP,
    update: Update,
    n_steps: int,
    record: Record,
    result: ChainResult,
    langevin_step: Callable[[Tensor, Tensor, Update], Tensor],
) -> None:
    """n_steps updates with the MLP's own gradient, written into `result`."""
    wide = _WideMLP(mlp, z.shape[0])
    for first in range(0, z.shape[0], wide.group):
        rows = slice(first, first + wide.group)
        mine = rows_of(update, first, rows)
        at = z[rows]
        for step in range(n_steps):
            energy, grad = wide.energy_grad(at, first)
            moved = langevin_step(at, grad, mine.at_step(step))
            _record_step(result, record, rows, step, energy, grad, mine.extra_grad, at, moved)
            at = moved
        result.z[rows] = at


def rows_of(update: Update, first: int, rows: slice) -> Update:
    """The update of a group of chains."""

    def per_chain(t: Tensor | None) -> Tensor | None:
        return t[rows] if t is not None and t.dim() == 2 else t

    return update._replace(
        chain_coefficients=per_chain(update.chain_coefficients),
        prior_mean=per_chain(update.prior_mean),
        prior_precision=per_chain(update.prior_precision),
        frozen=per_chain(update.frozen),
        noise=None if update.noise is None else update.noise[:, rows],
        first_chain=(update.first_chain + first) % (1 << 32),
        extra_grad=per_chain(update.extra_grad),
    )


def _record_step(
    result: ChainResult,
    record: Record,
    rows: slice,
    step: int,
    energy: Tensor,
    grad: Tensor,
    extra_grad: Tensor | None,
    before: Tensor,
    after: Tensor,
) -> None:
    if record.diagnostics:
        first_bad = result.first_bad_step[rows]
        first_bad[~torch.isfinite(after).all(dim=1) & (first_bad < 0)] = step
    if (step + 1) % record.thin:
        return
    kept = (step + 1) // record.thin - 1
    if record.diagnostics:
        result.energy[kept, rows] = energy
        result.grad_norm[kept, rows] = (grad if extra_grad is None else grad + extra_grad).norm(dim=1)
        result.displacement[kept, rows] = (after - before).norm(dim=1)
    if record.trajectory:
        result.trajectory[kept, rows] = after
