"""The four operations as registered operators, torch.ops.jlebm_fast.*: for compilers, exporters and autograd.

    schema        tensors, lists and numbers: the records of `problem.py`, spread out
    kernel        one for all devices: rebuilds the records and calls `ops.py`, which checks and chooses a backend
    fake          shapes and dtypes alone, for tracing
    vmap          one call per entry of the batch; for the energy of one net at a batch of points, one call for all
    autograd      mlp_energy_grad is differentiable in z, weights, biases and context_bias, as often as wanted, through
                  the formulas of `backends/eager.py`; a chain and a step give detached results, by contract

and two that only graphs need: `draw_noise_key`, one draw from torch's global generator as an operator with a side
effect, so that a compiler neither drops, merges nor moves it, and draws what eager mode draws; and `top_singular`, the
converged spectral norm (`spectral.py`).

Eager calls of `ops.py` do not come through here: `ops.watched` decides. Plain `Library.define` and `impl` are used
because `torch.library.custom_op` adds several microseconds to every call.
"""

from __future__ import annotations

import functools
import operator

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import ops, precision, rng
from .backends import cpu_plain, eager
from .problem import MLP, ChainResult, MLPSpec, Record, Update
from .spectral import top_singulars

NAMESPACE = "jlebm_fast"

# one text for the constants of a net: lists of names and numbers would cost a call several microseconds
_MLP = "Tensor[] weights, Tensor?[] biases, Tensor? context_bias, Tensor? logit, str spec, float out_scale"
_UPDATE = (
    "Tensor step_coefficients, Tensor? chain_coefficients, Tensor? prior_mean, Tensor? prior_precision, "
    "Tensor? frozen, Tensor? noise, Tensor noise_key, SymInt first_step, SymInt first_chain, Tensor? extra_grad"
)
SCHEMAS = {
    "langevin_noise": "(Tensor noise_key, SymInt n_steps, SymInt chains, SymInt dim, SymInt first_step, "
    "SymInt first_chain, SymInt stream, Device device, ScalarType dtype, str backend) -> Tensor",
    "langevin_step": f"(Tensor z, Tensor grad, {_UPDATE}, str backend) -> Tensor",
    "mlp_energy_grad": f"(Tensor z, {_MLP}, str backend, str? precision) -> (Tensor, Tensor)",
    "mlp_langevin_chain": f"(Tensor z, {_MLP}, {_UPDATE}, SymInt n_steps, bool diagnostics, bool trajectory, "
    "SymInt thin, str backend, str? precision) -> Tensor[]",
    "draw_noise_key": "() -> Tensor",
    "top_singular": "(Tensor weight, Tensor u) -> (Tensor, Tensor, Tensor)",
}


# --- records, spread out and rebuilt ----------------------------------------------------------------------------------


def spread_mlp(mlp: MLP, *, negated: bool = False) -> tuple:
    """The arguments of `_MLP`; those of −f if negated."""
    spec, weights, biases, context_bias, logit = mlp
    scale = -spec.out_scale if negated else spec.out_scale
    return list(weights), list(biases), context_bias, logit, spec.text, scale


@functools.lru_cache(maxsize=1024)
def _checked_spec(text: str, out_scale: float) -> MLPSpec:
    spec = MLPSpec.of_text(text, out_scale)
    ops.check_spec(spec)
    return spec


def spread_update(update: Update) -> tuple:
    """The arguments of `_UPDATE`, in the order of the record."""
    return tuple(rng.key_tensor(v) if name == "noise_key" else v for name, v in zip(Update._fields, update))


_N_MLP, _N_UPDATE = 6, len(Update._fields)


# --- kernels, one for all devices -------------------------------------------------------------------------------------


def _langevin_noise(noise_key, n_steps, chains, dim, first_step, first_chain, stream, device, dtype, backend):
    return ops.direct_noise(
        noise_key, n_steps, chains, dim, first_step, first_chain, stream, torch.device(device), dtype, backend
    )


def _langevin_step(z, grad, *rest):
    return ops.direct_step(z, grad, Update._make(rest[:_N_UPDATE]), rest[_N_UPDATE])


def _mlp_energy_grad(*args):
    found = cpu_plain.energy_grad_operator(args, _checked_spec)
    if found is not None:
        return found
    z, weights, biases, context_bias, logit, spec, out_scale, backend, asked = args
    mlp = MLP(_checked_spec(spec, out_scale), weights, biases, context_bias, logit)
    if asked == precision.asked():  # what there is to enter costs a microsecond
        return ops.direct_energy_grad(z, mlp, backend)
    with precision.using(asked):
        return ops.direct_energy_grad(z, mlp, backend)


def _mlp_langevin_chain(*args):
    found = cpu_plain.chain_operator(args, _checked_spec)
    if found is not None:
        return found
    z, weights, biases, context_bias, logit, spec, out_scale, *rest = args
    mlp = MLP(_checked_spec(spec, out_scale), weights, biases, context_bias, logit)
    n_steps, diagnostics, trajectory, thin, backend, asked = rest[_N_UPDATE:]
    update, record = Update._make(rest[:_N_UPDATE]), Record(diagnostics, trajectory, thin)
    if asked == precision.asked():
        result = ops.direct_chain(z, mlp, update, n_steps, record, backend)
    else:
        with precision.using(asked):
            result = ops.direct_chain(z, mlp, update, n_steps, record, backend)
    # what was asked for alone: an empty tensor in the place of all else would cost a microsecond each
    return [value for value in result if value is not None]


def _draw_noise_key():
    return rng.key_tensor(rng.draw_noise_key())


def _top_singular(weight, u):
    (top,) = top_singulars([(weight.detach(), u.detach())])
    # never an alias of u, which stays what it was where no iteration was possible
    sigma = top.sigma.reshape(()).clone() if isinstance(top.sigma, Tensor) else weight.new_tensor(top.sigma)
    return top.u.clone(), top.v.clone(), sigma


# --- fakes ------------------------------------------------------------------------------------------------------------


def _fake_noise(noise_key, n_steps, chains, dim, first_step, first_chain, stream, device, dtype, backend):
    return torch.empty((n_steps, chains, dim), dtype=dtype, device=device)


def _fake_step(z, grad, *rest):
    return z.new_empty(z.shape)


def _fake_energy_grad(z, *rest):
    return z.new_empty(z.shape[0]), z.new_empty(z.shape)


def _fake_chain(z, *rest):
    n_steps, diagnostics, trajectory, thin, _, _ = rest[_N_MLP + _N_UPDATE :]
    kept, chains = n_steps // thin, z.shape[0]
    results = [z.new_empty(z.shape)]
    if diagnostics:
        results += [z.new_empty((kept, chains)) for _ in range(3)]
        results.append(z.new_empty((chains,), dtype=torch.int64))
    if trajectory:
        results.append(z.new_empty((kept, *z.shape)))
    return results


def _fake_draw():
    return torch.empty(1, dtype=torch.int64, device="cpu")


def _fake_top_singular(weight, u):
    return u.new_empty(weight.shape[0]), u.new_empty(weight.shape[1]), weight.new_empty(())


# --- autograd ---------------------------------------------------------------------------------------------------------


# what below autograd turns a call away from its kernel: a mode or a tensor subclass, functionalisation, a transform
_WATCHERS = functools.reduce(
    operator.or_,
    (
        torch._C.DispatchKeySet(key).raw_repr()
        for key in (
            torch._C.DispatchKey.Python,
            torch._C.DispatchKey.Functionalize,
            torch._C.DispatchKey.FuncTorchDynamicLayerBackMode,
        )
    ),
)


def _search_by_ops(z, weights, biases, context_bias):
    return ops.requires_grad(z, MLP(None, weights, biases, context_bias))


_any_requires_grad = getattr(torch._C, "_any_requires_grad", _search_by_ops)  # torch 2.6 has none


def _mlp_energy_grad_autograd(keyset, *args):
    if torch.is_grad_enabled():
        forward_mode = forward_ad._current_level >= 0
        if forward_mode or _any_requires_grad(*args[:4]):
            if forward_mode or torch._C._functorch.peek_interpreter_stack() is not None:
                return _by_formulas(*args)
            z, weights, biases, context_bias, logit, *constants = args
            return _EnergyGrad.apply(keyset, len(weights), constants, z, context_bias, logit, *weights, *biases)
    return _below_autograd(keyset, *args)


def _below_autograd(keyset, *args):
    """mlp_energy_grad without its formula: the kernel at once where nobody looks on, since a second pass through the
    dispatcher would convert all arguments there and back once more."""
    if not keyset.raw_repr() & _WATCHERS:
        return _mlp_energy_grad(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return operators.mlp_energy_grad.default.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _by_formulas(z, weights, biases, context_bias, logit, spec, out_scale, backend, asked):
    """In plain torch, which knows forward mode and every gradient of torch.func, nested as may be."""
    mlp = MLP(_checked_spec(spec, out_scale), weights, biases, context_bias, logit)
    ops.backend_of_energy_grad(z, mlp, backend)  # what does not fit is refused as ever
    return eager.mlp_energy_grad(z, mlp)


class _EnergyGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, keyset, n_layers, constants, z, context_bias, logit, *parameters):
        ctx.save_for_backward(z, context_bias, logit, *parameters)
        ctx.n_layers, ctx.spec = n_layers, constants[:2]
        weights, biases = list(parameters[:n_layers]), list(parameters[n_layers:])
        return _below_autograd(keyset, z, weights, biases, context_bias, logit, *constants)

    @staticmethod
    def backward(ctx, energy_cotangent, grad_cotangent):
        z, context_bias, logit, *parameters = ctx.saved_tensors
        again = torch.is_grad_enabled()  # a second derivative is wanted: stay connected to the inputs
        # either way tensors of our own, so that what z and the weights may share upstream is not counted twice
        own = (lambda t: t.view_as(t)) if again else (lambda t: t.detach().requires_grad_())
        leaves = [None if leaf is None else own(leaf) for leaf in (z, context_bias, *parameters)]
        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        with torch.enable_grad():
            z, context_bias, *parameters = leaves
            weights, biases = parameters[: ctx.n_layers], parameters[ctx.n_layers :]
            energy, grad = eager.mlp_energy_grad(z, MLP(_checked_spec(*ctx.spec), weights, biases, context_bias, logit))
            cotangents = [(energy, energy_cotangent), (grad, grad_cotangent)]
            outputs, seeds = zip(*[(value, seed) for value, seed in cotangents if seed is not None], strict=True)
            found = torch.autograd.grad(outputs, wanted, seeds, create_graph=again, allow_unused=True)
        gradients = iter(found)
        of_z, of_context, *of_parameters = [
            next(gradients) if leaf is not None and leaf.requires_grad else None for leaf in leaves
        ]
        return (None, None, None, of_z, of_context, None, *of_parameters)


# --- vmap -------------------------------------------------------------------------------------------------------------


def _one_by_one(overload):
    """The rule of torch.func.vmap: call by call. A key that is not batched gives every entry the same noise, as a loop
    over calls with that key does; drawing one inside is refused by vmap itself, unless its randomness allows it."""

    def rule(info, in_dims, *args):
        def entry(arg, dim, i):
            if isinstance(arg, (list, tuple)):
                return [entry(a, d, i) for a, d in zip(arg, dim or [None] * len(arg), strict=True)]
            return arg if dim is None else arg.select(dim, i)

        calls = [[entry(a, d, i) for a, d in zip(args, in_dims, strict=True)] for i in range(info.batch_size)]
        results = [overload(*call) for call in calls]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = [torch.stack(values) for values in zip(*results, strict=True)]
        return type(results[0])(stacked), type(results[0])([0] * len(stacked))

    return rule


def _vmapped_energy_grad(info, in_dims, z, *rest):
    flat_dims = [d for dim in in_dims[1:] for d in (dim if isinstance(dim, (list, tuple)) else [dim])]
    if in_dims[0] is None or any(dim is not None for dim in flat_dims) or rest[2] is not None or rest[3] is not None:
        return _one_by_one(operators.mlp_energy_grad.default)(info, in_dims, z, *rest)
    z = z.movedim(in_dims[0], 0)
    energy, grad = operators.mlp_energy_grad.default(z.flatten(0, 1), *rest)
    return (energy.view(z.shape[:2]), grad.view(z.shape)), (0, 0)


# --- registration -----------------------------------------------------------------------------------------------------


def _register() -> torch.library.Library:
    library = torch.library.Library(NAMESPACE, "DEF")
    kernels = {
        "langevin_noise": (_langevin_noise, _fake_noise),
        "langevin_step": (_langevin_step, _fake_step),
        "mlp_energy_grad": (_mlp_energy_grad, _fake_energy_grad),
        "mlp_langevin_chain": (_mlp_langevin_chain, _fake_chain),
        "top_singular": (_top_singular, _fake_top_singular),
        "draw_noise_key": (_draw_noise_key, _fake_draw),
    }
    for name, schema in SCHEMAS.items():
        kernel, fake = kernels[name]
        tags = [torch.Tag.pt2_compliant_tag]
        if name == "draw_noise_key":
            tags.append(torch.Tag.nondeterministic_seeded)
        library.define(name + schema, tags=tags)
        library.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    library.impl("mlp_energy_grad", _mlp_energy_grad_autograd, "Autograd", with_keyset=True)
    for name in ("langevin_noise", "langevin_step", "mlp_langevin_chain", "top_singular"):
        # autograd passes these by, and their kernels run outside it: detached results
        library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    for name in ("langevin_step", "mlp_langevin_chain"):
        rule = _one_by_one(getattr(torch.ops.jlebm_fast, name).default)
        torch.library.register_vmap(f"{NAMESPACE}::{name}", rule, lib=library)
    torch.library.register_vmap(f"{NAMESPACE}::mlp_energy_grad", _vmapped_energy_grad, lib=library)
    _register_side_effect(library)
    return library


def _register_side_effect(library: torch.library.Library) -> None:
    """Draws keep their number and order in a compiled graph."""
    from torch._higher_order_ops import effects

    if hasattr(library, "_register_effectful_op"):
        library._register_effectful_op(f"{NAMESPACE}::draw_noise_key", effects._EffectType.ORDERED)
    else:  # torch before 2.10
        effects._register_effectful_op(torch.ops.jlebm_fast.draw_noise_key.default, effects._EffectType.ORDERED)


LIBRARY = _register()
operators = torch.ops.jlebm_fast


# --- from records to operators ----------------------------------------------------------------------------------------


def langevin_noise(noise_key, n_steps, chains, dim, first_step, first_chain, stream, device, dtype, backend) -> Tensor:
    key = rng.key_tensor(noise_key)
    return operators.langevin_noise.default(
        key, n_steps, chains, dim, first_step, first_chain, stream, device, dtype, backend
    )


def langevin_step(z: Tensor, grad: Tensor, update: Update, backend: str) -> Tensor:
    return operators.langevin_step.default(z, grad, *spread_update(update), backend)


def mlp_energy_grad(z: Tensor, mlp: MLP, backend: str, asked: str | None = None) -> tuple[Tensor, Tensor]:
    return operators.mlp_energy_grad.default(z, *spread_mlp(mlp), backend, asked)


def mlp_langevin_chain(
    z: Tensor,
    mlp: MLP,
    update: Update,
    n_steps: int,
    record: Record,
    backend: str,
    asked: str | None = None,
    *,
    negated: bool = False,
) -> ChainResult:
    """`ops.mlp_langevin_chain`; asked is the precision (`precision.py`), negated says that the energy is −f."""
    z, *recorded = operators.mlp_langevin_chain.default(
        z,
        *spread_mlp(mlp, negated=negated),
        *spread_update(update),
        n_steps,
        record.diagnostics,
        record.trajectory,
        record.thin,
        backend,
        asked,
    )
    per_step = recorded[:4] if record.diagnostics else [None] * 4
    return ChainResult(z, *per_step, recorded[-1] if record.trajectory else None)
