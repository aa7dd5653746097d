"""The MLP kernels on the host: random energies, plain torch at each precision, and calls by geometry."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math

import host_build
import torch
from torch import Tensor

from jlebm_fast.backends import eager, native_fields
from jlebm_fast.problem import MLP, ChainResult, MLPSpec, Record, Update

PRECISIONS = {"fp32": 0, "tf32": 1, "bf16": 2}
POISON = 0xFF  # in every byte: a NaN in every precision
REGIMES = ("resident", "streamed", "lean", "cluster", "warpgroup")
H100_SHARED, A100_SHARED, CONSUMER_SHARED = 232448, 166912, 101376


def make_mlp(
    widths: list[int],
    activations: str | list[str],
    *,
    head: str = "identity",
    out_scale: float = 1.0,
    chains: int = 1,
    context: bool = False,
    bias: bool = True,
    seed: int = 0,
) -> MLP:
    """Random weights of a scale that keeps pre-activations of order one."""
    generator = torch.Generator().manual_seed(seed)
    names = [activations] * (len(widths) - 2) if isinstance(activations, str) else activations
    constants = {"leaky_relu": 0.2, "softplus": 1.3, "elu": 0.8}
    spec = MLPSpec(tuple(widths), tuple(names), tuple(constants.get(n, 0.0) for n in names), head, out_scale)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return MLP(
        spec,
        tuple(1.3 * normal(b, a) / math.sqrt(a) for a, b in itertools.pairwise(widths)),
        tuple(0.3 * normal(b) if bias else None for b in widths[1:]),
        0.5 * normal(chains, widths[1]) if context else None,
        torch.randint(0, widths[-1], (chains,), generator=generator) if head == "logit" else None,
    )


def cast(record, dtype: torch.dtype):
    """An MLP or Update with its float32 tensors in another type."""

    def one(value):
        if isinstance(value, tuple) and not hasattr(value, "_fields"):
            return tuple(one(v) for v in value)
        return value.to(dtype) if isinstance(value, Tensor) and value.dtype == torch.float32 else value

    return record._replace(**{name: one(value) for name, value in record._asdict().items()})


def to_tf32(value: Tensor) -> Tensor:
    return ((value.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def plain_energy_grad(z: Tensor, mlp: MLP, precision: str) -> tuple[Tensor, Tensor]:
    """f and its gradient as plain torch has them at a precision."""
    if precision == "fp32":
        return eager.mlp_energy_grad(z, mlp)
    if precision == "bf16":
        energy, grad = eager.mlp_energy_grad(z.bfloat16(), cast(mlp, torch.bfloat16))
        return energy.float(), grad.float()
    weights = [to_tf32(w) for w in mlp.weights]
    h, pre = z, []
    for layer, (name, parameter) in enumerate(zip(mlp.spec.activations, mlp.spec.activation_params)):
        bias = 0.0 if mlp.biases[layer] is None else mlp.biases[layer]
        a = to_tf32(h) @ weights[layer].T + bias
        if layer == 0 and mlp.context_bias is not None:
            a = a + mlp.context_bias
        pre.append(a)
        h = eager.activation(name, parameter, a)
    bias = 0.0 if mlp.biases[-1] is None else mlp.biases[-1]
    energy, delta = eager.head_value_and_slope(mlp, to_tf32(h) @ weights[-1].T + bias)
    delta = to_tf32(delta) @ weights[-1]
    for layer in reversed(range(mlp.spec.n_hidden)):
        name, parameter = mlp.spec.activations[layer], mlp.spec.activation_params[layer]
        delta = to_tf32(delta * eager.activation_slope(name, parameter, pre[layer])) @ weights[layer]
    return energy, delta


def plain_chain(z: Tensor, mlp: MLP, update: Update, n_steps: int, precision: str) -> Tensor:
    for step in range(n_steps):
        z = eager.langevin_step(z, plain_energy_grad(z, mlp, precision)[1], update.at_step(step))
    return z


def rms(a: Tensor, b: Tensor) -> float:
    """Root mean square of a difference: a maximum would hang on the one chain that crosses a kink."""
    return float((a.double() - b.double()).square().mean().sqrt())


def typical_rms(a: Tensor, b: Tensor) -> float:
    """The same without the worst tenth of the chains: rounded operands put a few units on the other side of a kink, and
    not the same ones in two ways of rounding.
    """
    squares = (
        (a.double() - b.double()).square().flatten(1) if a.dim() > 1 else (a.double() - b.double()).square()[:, None]
    )
    of_chains = squares.mean(1).sort().values
    return float(of_chains[: max(1, -(-9 * len(of_chains) // 10))].mean().sqrt())


def assert_as_good_as_torch(got: Tensor, plain: Tensor, oracle: Tensor, what: str) -> None:
    assert got.shape == oracle.shape, what
    assert torch.isfinite(got).all(), what
    error, allowed = rms(got, oracle), 2 * rms(plain, oracle) + 1e-6
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def coefficients(n_steps: int, step_size: float = 0.4) -> Tensor:
    """c_grad, c_prior, c_noise of z <- z + s²/2 (grad f - z) + s eps, shrinking a little from step to step."""
    s = step_size * 0.98 ** torch.arange(n_steps)
    return torch.stack([s * s / 2, s * s / 2, s], dim=1)


@dataclasses.dataclass(frozen=True)
class Host:
    """Calls of the host build with tensors; outputs and workspaces are poisoned first.

    workspaces   of the last call
    """

    module: object
    workspaces: collections.deque = dataclasses.field(default_factory=lambda: collections.deque(maxlen=1))

    def run_energy_grad(
        self, z: Tensor, mlp: MLP, precision: str, *, plan=(), limits=host_build.H100, seed=1
    ) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        energy, grad = torch.full((z.shape[0],), math.nan), torch.full_like(z, math.nan)
        hidden, delta = ([torch.full((z.shape[0], w), math.nan) for w in mlp.spec.widths[1:-1]] for _ in range(2))
        self._want(plan)
        address = native_fields.Addresses()
        fields = native_fields.mlp_fields(mlp, address)
        self.module.cuda_mlp_energy_grad(
            chains=z.shape[0],
            z=address(z),
            mlp=fields,
            energy=address(energy),
            grad=address(grad),
            hidden=[address(t) for t in hidden],
            delta=[address(t) for t in delta],
            launch=self._launch("mlp_energy_grad", z.shape[0], fields, True, address, precision, seed, limits),
        )
        return energy, grad, hidden, delta

    def run_chain(
        self,
        z: Tensor,
        mlp: MLP,
        update: Update,
        n_steps: int,
        precision: str,
        record: Record = Record(),
        *,
        plan=(),
        limits=host_build.H100,
        seed=1,
        key_at: Tensor | None = None,
    ) -> ChainResult:
        n_kept = n_steps // record.thin
        kept: list[Tensor | None] = [None] * 5
        if record.diagnostics:
            kept[:3] = [torch.full((n_kept, z.shape[0]), math.nan) for _ in range(3)]
            kept[3] = torch.full((z.shape[0],), -7)
        if record.trajectory:
            kept[4] = torch.full((n_kept, *z.shape), math.nan)
        out = torch.full_like(z, math.nan)
        self._want(plan)
        address = native_fields.Addresses()
        fields = native_fields.mlp_fields(mlp, address)
        where = (fields, record.diagnostics, address, precision, seed, limits)
        self.module.cuda_mlp_langevin_chain(
            chains=z.shape[0],
            n_steps=n_steps,
            z=address(z),
            mlp=fields,
            update=native_fields.update_fields(update, address),
            noise_key_at=address(key_at),
            record=(record.thin, *(address(t) for t in kept)),
            out=address(out),
            launch=self._launch("mlp_langevin_chain", z.shape[0], *where),
        )
        return ChainResult(out, *kept)

    def plan(
        self, mlp: MLP, chains: int, precision: str, *, shared: int, energies: bool = False, warpgroups: bool = False,
        clusters: bool = False, plan=()
    ) -> dict:  # fmt: skip
        self._want(plan)
        address = native_fields.Addresses()
        fields = native_fields.mlp_fields(mlp, address)
        return self.module.mlp_plan(fields, chains, energies, PRECISIONS[precision], 132, shared, warpgroups, clusters)

    def unsupported_reason(self, mlp: MLP, precision: str, shared: int) -> str:
        self._want(())
        address = native_fields.Addresses()
        launch = (0, 0, PRECISIONS[precision], 0, 0, 132, shared, False, False)
        return self.module.cuda_mlp_unsupported_reason(mlp=native_fields.mlp_fields(mlp, address), launch=launch)

    def _launch(self, op, chains, fields, energies, address, precision, seed, limits) -> tuple:
        limits = host_build.launch_limits(limits)
        launch = (0, seed, PRECISIONS[precision], 0, 0, *limits)
        n_bytes, _ = self.module.cuda_mlp_plan(op=op, chains=chains, mlp=fields, energies=energies, launch=launch)
        # exactly as many, so that the address sanitizer sees what goes beyond
        workspace = torch.full((n_bytes,), POISON, dtype=torch.uint8)
        address.append(workspace)
        self.workspaces.append(workspace)
        return (0, seed, PRECISIONS[precision], workspace.data_ptr(), n_bytes, *limits)

    def _want(self, plan: tuple[str | int, ...]) -> None:
        """(regime, chain tiles, warps, groups, z in shared memory, layers with resident weights, blocks of a cluster),
        as many as matter; a streamed plan streams all layers where nothing else is said.
        """
        named = (REGIMES.index(plan[0]), *plan[1:]) if plan else ()
        named = (*named, *host_build.ANY_PLAN[len(named) :])
        if plan and plan[0] == "streamed" and len(plan) < 6:
            named = (*named[:5], 0, *named[6:])
        self.module.want_plan(named)


@functools.cache
def host() -> Host:
    return Host(host_build.host_module())
