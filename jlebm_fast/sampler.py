"""FastLangevin: a frozen configuration, and sample(), the short-run Langevin chain of the papers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import backends, dynamics, ops, precision, stepwise
from .backends import cpu_plain
from .captured import capture_of
from .checks import check_like, describe, whole
from .dynamics import STANDARD_NORMAL, GaussianPrior
from .energy_source import EnergySource
from .explanation import explain
from .latents import LatentLayout, Latents, flatten_latents, flatten_mask
from .modes import capturing, chain_mode, device_of, refuse_trace, unwatched, watched
from .problem import ChainResult, MLPSpec, Record, Update
from .rng import COUNTER_RANGE, check_sources, draw_unwatched, noise_key_of

PRECISIONS = (None, *precision.NAMES)
_CPU = torch.device("cpu")


class LangevinInfo(NamedTuple):
    """What a chain tells about itself; kept are the steps k with (k + 1) % thin == 0, n_kept = n_steps // thin.

    energy           [n_kept, chains] the energy where step k's gradient was taken, before its update; with a spectral
                     norm the converged one, which the module's own forward in eval mode need not have
    grad_norm        [n_kept, chains] norm of the gradient there, log-likelihood included, prior excluded
    displacement     [n_kept, chains] length of step k's move
    first_bad_step   [chains] int64: first step of this call that left z non-finite, counted from 0; -1 if none did
    trajectory       [n_kept, chains, dim] z after step k; None unless asked for
    The first four are None when only the trajectory was asked for.
    """

    energy: Tensor | None
    grad_norm: Tensor | None
    displacement: Tensor | None
    first_bad_step: Tensor | None
    trajectory: Tensor | None


def _step_rows(
    step_size: object, noise_scale: object, n_steps: int, prior: tuple[float, float] | None
) -> tuple[Tensor, dict]:
    """The step coefficients [n_steps, 3] in float64, and an empty store for what depends on device and dtype."""
    return dynamics.step_rows(step_size, noise_scale, n_steps), {}


# a loop that makes a sampler of the same numbers at every step (compat.py) makes their tensors once; nobody writes them
_shared_step_rows = functools.lru_cache(maxsize=64)(_step_rows)


@dataclasses.dataclass(frozen=True, eq=False)
class FastLangevin:
    """Short-run Langevin dynamics on p(z) ∝ exp(f(z)) N(z; mean, std²), the whole chain in one native call.

        z ← z + s²/2 (∇f(z) + (mean − z)/std²) + s · noise_scale · eps,      eps ~ N(0, I),  n_steps times

    Args:
        energy: EnergyMLP, or a module, a method of one or a callable, from latents to [chains], [chains, 1] or
            [chains, 1, 1, 1]. Modules and methods that compute an MLP are recognised and run in the fused kernels,
            everything else runs through autograd and the fused step; `explain` says which. Parameters are read at every
            call. A plain function (`lambda z: net(z)`) is never recognised: net's own forward then runs at every step,
            with all it does to its buffers, as in the published loops.
        n_steps: steps of a chain
        step_size: s; float, sequence of n_steps, or tensor [chains]
        noise_scale: factor on the noise alone; 1 Langevin, 0 gradient ascent; float, sequence of n_steps or [chains]
        prior: GaussianPrior, or None for no prior term
        maximize: True, the energy is f and p ∝ exp(f) p0 (Cui et al.); False, E and p ∝ exp(−E) p0 (the LEBM code)
        backend: "auto", "cuda", "triton", "cpu" or "eager"
        precision: None (follow torch.get_float32_matmul_precision()), "fp32", "tf32" or "bf16"; on the CPU chains
            are fp32 whatever it says; on a GPU eager and energies that are no MLP refuse another than torch's own

    Raises:
        ValueError: an argument outside these ranges, here or at the call.

    Example:
        >>> from jlebm_fast import EnergyMLP
        >>> f = EnergyMLP(latent_dims=(2, 2, 2, 10), hidden=50, depth=4)
        >>> prior = FastLangevin(f, n_steps=60, step_size=0.4)
        >>> z = prior([torch.randn(100, d) for d in (2, 2, 2, 10)])
        >>> [tuple(layer.shape) for layer in z]
        [(100, 2), (100, 2), (100, 2), (100, 10)]

    Source: Cui, Wu, Han, ICCV 2023, eq. 8; Pang et al., NeurIPS 2020, eq. 7; Nijkamp et al., NeurIPS 2019 (short-run).
    """

    energy: nn.Module | Callable[..., Tensor]
    n_steps: int = dataclasses.field(default=60, kw_only=True)
    step_size: float | Sequence[float] | Tensor = dataclasses.field(default=0.4, kw_only=True)
    noise_scale: float | Sequence[float] | Tensor = dataclasses.field(default=1.0, kw_only=True)
    # from a function: a tracer finds the prior through the names in it, but cannot say where a default value comes from
    prior: GaussianPrior | None = dataclasses.field(default_factory=lambda: STANDARD_NORMAL, kw_only=True)
    maximize: bool = dataclasses.field(default=True, kw_only=True)
    backend: str = dataclasses.field(default="auto", kw_only=True)
    precision: str | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not callable(self.energy) or (isinstance(self.energy, type) and issubclass(self.energy, nn.Module)):
            came = f"the class {self.energy.__name__}" if isinstance(self.energy, type) else describe(self.energy)
            raise ValueError(f"energy must be a module or a callable, got {came}")
        object.__setattr__(self, "n_steps", whole(self.n_steps))
        ops.check_count("n_steps", self.n_steps)
        if self.n_steps > COUNTER_RANGE:
            raise ValueError(f"n_steps must be at most 2**32, the steps of a noise field, got {self.n_steps}")
        for name in ("step_size", "noise_scale"):
            object.__setattr__(self, name, dynamics.check_schedule(name, getattr(self, name), self.n_steps))
        dynamics.check_prior(self.prior)
        dynamics.check_maximize(self.maximize)
        backends.check_name(self.backend)
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {PRECISIONS}, got {self.precision!r}")
        object.__setattr__(self, "_source", EnergySource(self.energy))
        per_chain = isinstance(self.step_size, Tensor) or isinstance(self.noise_scale, Tensor)
        of_tensors = self.prior is not None and any(isinstance(v, Tensor) for v in (self.prior.mean, self.prior.std))
        own = per_chain or of_tensors or watched() or torch.is_inference_mode_enabled()
        prior = None if own or self.prior is None else (self.prior.mean, self.prior.std)
        rows, constants = (_step_rows if own else _shared_step_rows)(
            self.step_size, self.noise_scale, self.n_steps, prior
        )
        for name, value in (
            ("_step_rows", rows),
            ("_constants", constants),
            ("_per_chain", per_chain),
            ("_prior_of_tensors", of_tensors),
            ("_may_be_plain", self.backend in cpu_plain.BACKENDS and not per_chain and not of_tensors),
            ("_usual", None),
        ):
            object.__setattr__(self, name, value)

    def __call__(self, z: Latents, **options: Any) -> Latents | tuple[Latents, LangevinInfo]:
        """`sample(z, …)`."""
        return self.sample(z, **options)

    def sample(
        self,
        z: Latents,
        *,
        generator: torch.Generator | None = None,
        log_likelihood: Callable[[Latents], Tensor] | None = None,
        noise: Tensor | Sequence[Tensor] | None = None,
        mask: Tensor | Sequence[Tensor | bool] | None = None,
        return_info: bool = False,
        return_trajectory: bool = False,
        thin: int = 1,
        noise_key: int | Tensor | None = None,
        first_step: int = 0,
        first_chain: int = 0,
        context: Tensor | None = None,
        y: Tensor | int | None = None,
        capture: bool = True,
    ) -> Latents | tuple[Latents, LangevinInfo]:
        """Run the chain from z and return where it ends: same structure, device and dtype, detached, z untouched.

        Args:
            z: [chains, dim], [chains, dim, 1, 1], or a list or tuple of layers [chains, d_l]; float32 or float64
            generator: source of the noise key; default torch's global CPU generator
            log_likelihood: z (in its structure) → [chains] or a scalar sum; its gradient joins ∇f: a posterior chain.
                What it multiplies or subtracts must not be made inside torch.inference_mode: autograd refuses that
            noise: eps [n_steps, chains, dim], or one [n_steps, chains, d_l] per layer, instead of the noise contract's
            mask: True freezes: one bool per layer, one bool tensor per layer, [dim] or [chains, dim]
            return_info: also return a LangevinInfo with diagnostics
            return_trajectory: also return a LangevinInfo with the trajectory
            thin: keep every thin-th step
            noise_key: 64 bits that name the noise field; default: drawn from the generator
            first_step: index of this call's first step in the noise field (a chain continued)
            first_chain: index of this call's first chain in the noise field (one part of many chains)
            context: condition c of a conditional energy, [chains, context_dim]; passed to other callables as context=,
                whatever it is, and recognised in modules where it enters the first layer
            y: chosen logit, int or int64 [chains]; passed to other callables as y=, and recognised in modules where it
                enters the first layer or picks a logit
            capture: on a CUDA device, where a step goes through autograd (a log_likelihood, an energy that is no MLP),
                capture it once in a CUDA graph and replay it; False for callables that look at values on the host

        Returns:
            z, or (z, LangevinInfo) with return_info or return_trajectory.

        Raises:
            ValueError: an argument does not fit: what was expected and what came.

        Example:
            >>> from jlebm_fast import EnergyMLP
            >>> prior = FastLangevin(EnergyMLP(16, 50, 4), n_steps=60)
            >>> z, info = prior.sample(torch.randn(100, 16), return_info=True)
            >>> info.energy.shape
            torch.Size([60, 100])
        """
        if torch.compiler.is_compiling():
            from . import in_graph  # imports torch's compiler, which costs seconds

            options = {
                "generator": generator,
                "log_likelihood": log_likelihood,
                "noise": noise,
                "mask": mask,
                "return_info": return_info,
                "return_trajectory": return_trajectory,
                "thin": thin,
                "noise_key": noise_key,
                "first_step": first_step,
                "first_chain": first_chain,
                "context": context,
                "y": y,
                "capture": capture,
            }
            return in_graph.sample(self, z, options)
        thin = whole(thin)
        if self._may_be_plain and self._source.was_mlp and log_likelihood is noise is mask is context is y is None:
            asked = (z, generator, noise_key, first_step, first_chain, return_info, return_trajectory, thin)
            if torch.is_inference_mode_enabled():  # what is made inside it could not be used outside
                with torch.inference_mode(False):
                    key, answer = self._sample_plain(*asked)
            else:
                key, answer = self._sample_plain(*asked)
            if answer is not None:
                return answer
            if key is not None:
                noise_key, generator = key, None
        refuse_trace("FastLangevin.sample")  # the plain call above is none while a trace is made
        with chain_mode(device_of(z)):
            flat, layout = flatten_latents(z)
            if flat.is_inference():
                flat = flat.clone()
            if isinstance(context, Tensor) and context.is_inference():
                context = context.clone()
            update = self._update(flat, layout, generator, noise, mask, noise_key, first_step, first_chain)
            ops.check_thin(thin)
            record = Record(return_info, return_trajectory, thin)
            result = self._run(flat, layout, update, record, log_likelihood, context, y, capture)
            return self._answer(result, layout.restore(result.z if result.z is not flat else flat.clone()), record)

    def _sample_plain(
        self,
        z: Latents,
        generator: torch.Generator | None,
        noise_key: int | Tensor | None,
        first_step: int,
        first_chain: int,
        return_info: bool,
        return_trajectory: bool,
        thin: int,
    ) -> tuple[int | Tensor | None, Latents | tuple[Latents, LangevinInfo] | None]:
        """The usual call at the least cost: an MLP, latents on the CPU in float32, which the kernel takes and gives in
        their own structure. The second result is None where the call is not of that kind, and nothing was done; the
        first is then the noise key if one had to be drawn to see it.
        """
        if type(thin) is not int or thin < 1 or not unwatched():
            return None, None
        usual = self._usual
        if usual is None or not cpu_plain.lies_as(z, usual[0]):
            usual = self._usual_of(z)
            if usual is None:
                return None, None
        layout, rows, mean, precision = usual
        chains = len(z if isinstance(z, Tensor) else z[0])
        sign = 1.0 if self.maximize else -1.0
        mlp = self._source.plain_mlp(layout, sign, cpu_plain.WIDEST_LANES_LAYER, chains)
        if mlp is None:
            return None, None
        if noise_key is None and generator is None:
            noise_key = draw_unwatched(None)
        else:
            noise_key = noise_key_of(noise_key, generator, _CPU)
        update = Update(rows, None, mean, precision, None, None, noise_key, whole(first_step), whole(first_chain))
        record = Record(return_info, return_trajectory, thin)
        return noise_key, cpu_plain.chain_of_latents(
            z, layout, mlp, update, self.n_steps, record, LangevinInfo, not self.maximize
        )

    def _usual_of(self, z: Latents) -> tuple[LatentLayout, Tensor, Tensor | None, Tensor | None] | None:
        """The layout of latents that are plain, and the constants that an earlier call made for their width; kept for
        the next call."""
        layout = cpu_plain.plain_layout(z)
        known = None if layout is None else self._constants.get((layout.dim, torch.float32, _CPU))
        if known is None:
            return None
        usual = (layout, *known)
        object.__setattr__(self, "_usual", usual)
        return usual

    def _answer(self, result: ChainResult, end: Latents, record: Record) -> Latents | tuple[Latents, LangevinInfo]:
        """What sample returns, from the end of the chain in the structure of its start."""
        if not (record.diagnostics or record.trajectory):
            return end
        energy = result.energy if self.maximize or result.energy is None else -result.energy
        return end, LangevinInfo(
            energy, result.grad_norm, result.displacement, result.first_bad_step, result.trajectory
        )

    def explain(self, z: Latents, *, context: Tensor | None = None, y: Tensor | int | None = None) -> str:
        """What a call with such a z would do: recognised or not and why, the backend, and why not the others.

        Example:
            >>> from jlebm_fast import EnergyMLP
            >>> print(FastLangevin(EnergyMLP(16, 50, 4), backend="eager").explain(torch.randn(1, 16)))
            energy    EnergyMLP: 16 -> 50 -> 50 -> 50 -> 50 -> 1, leaky_relu(0.2), head identity
            path      mlp_langevin_chain: all 60 steps in one call
            backend   eager (plain torch, one operation after the other)
                      not cuda: backend='eager' was asked for
                      not triton: backend='eager' was asked for
                      not cpu: backend='eager' was asked for
        """
        with chain_mode(device_of(z)), precision.using(self.precision):
            flat, layout = flatten_latents(z)
            return explain(self, flat, layout, context, y)

    def _run(
        self,
        flat: Tensor,
        layout: LatentLayout,
        update: Update,
        record: Record,
        log_likelihood: Callable[[Latents], Tensor] | None,
        context: Tensor | None,
        y: Tensor | int | None,
        capture: bool,
    ) -> ChainResult:
        """The chain on the flat tensor, where maximize has become a sign: f = sign · energy."""
        sign = 1.0 if self.maximize else -1.0
        stepwise.check_likelihood(log_likelihood)
        likelihood = None if log_likelihood is None else stepwise.Likelihood(log_likelihood, layout)
        mlp, quadratic = self._source.mlp(flat, layout, context, y, sign, self.n_steps)
        energy = None
        if mlp is None:
            energy = stepwise.AnyEnergy(self._source.for_autograd(flat, layout, context, y), layout, context, y, sign)
        elif quadratic is not None and record.diagnostics:
            # the kernel would tell the network's energy and gradient alone
            energy = stepwise.WithQuadratic(mlp, quadratic, self.backend)
        elif quadratic is not None:
            update = quadratic.joined(update)

        def run() -> ChainResult:
            if energy is not None:
                return stepwise.any_energy_chain(
                    flat, energy, likelihood, update, self.n_steps, record, self.backend,
                    capture_of(flat, self.n_steps, capture),
                )  # fmt: skip
            if likelihood is None:
                return ops.sampler_chain(flat, mlp, update, self.n_steps, record, self.backend)
            return stepwise.posterior_chain(
                flat, mlp, likelihood, update, self.n_steps, record, self.backend,
                capture_of(flat, self.n_steps, capture),
            )  # fmt: skip

        if self.precision is None or flat.is_cpu:
            return run()
        self._check_precision(flat, None if mlp is None else mlp.spec)
        with precision.using(self.precision):
            return run()

    def _check_precision(self, flat: Tensor, spec: MLPSpec | None) -> None:
        """A precision other than torch's own can be had where the chosen backend multiplies the matrices itself."""
        of_torch = precision.OF_TORCH[torch.get_float32_matmul_precision()]
        if self.precision == of_torch:
            return
        op = "langevin_step" if spec is None else "mlp_langevin_chain"
        with precision.using(self.precision):
            chosen = backends.choose(op, self.backend, device=flat.device, dtype=flat.dtype, spec=spec)
        if spec is None or not getattr(chosen, "TAKES_PRECISION", False):
            who = "the energy's own forward" if spec is None else f"backend {chosen.NAME!r}"
            raise ValueError(
                f"precision={self.precision!r} cannot be had: {who} on {flat.device} computes in torch's own, "
                f"{of_torch}; call torch.set_float32_matmul_precision, or leave precision=None"
            )

    def _update(
        self,
        flat: Tensor,
        layout: LatentLayout,
        generator: torch.Generator | None,
        noise: Tensor | Sequence[Tensor] | None,
        mask: object,
        noise_key: int | None,
        first_step: int,
        first_chain: int,
    ) -> Update:
        if noise is not None:
            check_sources(noise, noise_key, generator)
            noise, noise_key = self._flat_noise(noise, flat, layout), 0
        coefficients, mean, precision = self._constant_terms(flat)
        return Update(
            coefficients,
            dynamics.chain_coefficients(self.step_size, self.noise_scale, flat) if self._per_chain else None,
            mean,
            precision,
            None if mask is None else flatten_mask(mask, layout, flat),
            noise,
            noise_key_of(noise_key, generator, flat.device),
            whole(first_step),
            whole(first_chain),
        )

    def _constant_terms(self, flat: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(step coefficients, prior mean, prior precision); made once, but for what a prior of tensors has to say."""
        key = (flat.shape[1], flat.dtype, flat.device)
        known = self._constants.get(key)
        if known is None:
            # On a GPU the copy of the rows, last, waits for this stream: later calls, from other streams, may then read
            # all of them at once.
            prior = (None, None) if self.prior is None else self.prior.terms(flat)
            known = (self._step_rows.to(flat.device, flat.dtype), *prior)
            # what a mode or transform makes is not for other calls, and what a graph records has no values yet
            if not watched(flat) and not capturing(flat.device):
                self._constants[key] = known
        else:
            if flat.is_cuda and not torch.compiler.is_compiling() and not capturing(flat.device):
                # made on another stream perhaps, whose allocator would give the memory away while this one reads
                stream = torch.cuda.current_stream(flat.device)
                for term in known:
                    if term is not None:
                        term.record_stream(stream)
            if self._prior_of_tensors:
                return (known[0], *self.prior.terms(flat))
        return known

    def _flat_noise(self, noise: Tensor | Sequence[Tensor], flat: Tensor, layout: LatentLayout) -> Tensor:
        chains, dim = flat.shape
        if isinstance(noise, (list, tuple)):
            if len(noise) != len(layout.dims):
                raise ValueError(f"noise must have {len(layout.dims)} entries, one per layer of z, got {len(noise)}")
            for i, (layer, d) in enumerate(zip(noise, layout.dims, strict=True)):
                check_like(f"noise[{i}]", layer, ((self.n_steps, chains, d),), flat)
            noise = torch.cat(list(noise), dim=2)
        return check_like("noise", noise, ((self.n_steps, chains, dim),), flat).detach().contiguous().resolve_neg()
