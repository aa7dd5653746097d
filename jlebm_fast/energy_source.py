"""Where a sampler finds its energy, whatever it was given: an EnergyMLP, somebody's module or method, a callable."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import types
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .checks import SUPPORTED_DTYPES, describe, dtype_name
from .energy import EnergyLinear, EnergyMLP
from .latents import LatentLayout
from .modes import capturing, chain_mode, copies_of_buffers, is_compiled, run_on_buffers
from .problem import MLP
from .quadratic import Quadratic
from .recognition.agreeing import agrees
from .recognition.examining import Unrecognised, examined, give_up_on, recognised
from .recognition.probing import NO_CONDITIONS, Conditions, Forward, OtherPath, Probed
from .recognition.recognised import Layer, Recognised, converged_buffers
from .recognition.twins import FORWARD_ERRORS, copy_of
from .recognition.watching import HOOKS_OF_ALL
from .settings import settings_of

_CPU = torch.device("cpu")
_MOST_COUNTS = 256  # numbers of chains that are remembered
_DISTRIBUTED = (nn.parallel.DistributedDataParallel, nn.DataParallel)


class EnergySource:
    """Where the sampler finds its energy: an EnergyMLP, a recognised module, or a callable for autograd."""

    def __init__(self, energy: nn.Module | Callable[..., Tensor]) -> None:
        self.energy = energy
        self._known: list[tuple] = []
        self.was_mlp = True  # until a call finds that it is none: whether `plain_mlp` is worth asking

    def __reduce__(self) -> tuple:
        return EnergySource, (self.energy,)

    def known(self, layout: LatentLayout, training: bool) -> tuple | None:
        """Its `settings_of` when an earlier call recognised a module, and the (spec, terms) of it, for `in_graph.py`;
        None if none did."""
        for dims, listed, mode, settings, structure in self._known:
            if dims == layout.dims and listed == (layout.container is not Tensor) and mode == training:
                return settings, structure
        return None

    def _remember(self, found: Recognised | Probed, layout: LatentLayout, training: bool) -> None:
        if found.plain is None or self.method != "forward":
            return
        for entry in self._known:
            if entry[-1] is found.plain:
                return
        key = (layout.dims, layout.container is not Tensor, training)
        known = (*key, settings_of(self.net), found.plain)
        self._known = [entry for entry in self._known if entry[:3] != key] + [known]

    @property
    def net(self) -> nn.Module | Callable[..., Tensor]:
        """The module itself, out of wrappers that only distribute or compile it; of a module's method the module."""
        net = self.energy
        if type(net) is types.MethodType and isinstance(net.__self__, nn.Module):
            return net.__self__
        while True:
            if is_compiled(net):
                net = net._orig_mod
            elif isinstance(net, _DISTRIBUTED):
                net = net.module
            else:
                return net

    @property
    def method(self) -> str:
        """The method of `net` that takes the latents."""
        return self.energy.__name__ if type(self.energy) is types.MethodType else "forward"

    def name(self) -> str:
        return getattr(self.energy, "__name__", type(self.energy).__name__)

    def for_autograd(self, flat: Tensor, layout: LatentLayout, context: object, y: object) -> Callable[..., Tensor]:
        """The energy where no MLP of it is used: as `callable`, with spectral norms as converged as in the kernels
        where it is known to be an MLP, whose few evaluations were not worth reading it."""
        if is_plain_energy_mlp(self.net):
            return self.callable()
        return self.callable(converged_buffers(self.norms(layout, conditions(flat, context, y))))

    def norms(self, layout: LatentLayout, given: Conditions) -> list[Layer]:
        """The layers whose weights are divided by their spectral norm; none of what is no MLP, or an EnergyMLP."""
        for anew in (False, True):
            found = self.found(layout, given, anew=anew)
            if isinstance(found, Unrecognised):
                break
            with contextlib.suppress(OtherPath):  # they are others than when it was examined
                return found.norms
        return []

    def callable(self, changed: dict[str, Tensor] | None = None) -> Callable[..., Tensor]:
        """The energy for autograd; a module runs on clones of its buffers, made once per chain, or on changed ones."""
        energy = self.energy
        if not isinstance(energy, nn.Module):
            return energy
        while isinstance(energy, _DISTRIBUTED):
            energy = energy.module
        buffers = copies_of_buffers(energy) | (changed or {})
        if not buffers:
            return energy
        return lambda z, **options: run_on_buffers(energy, buffers, (z,), options)

    def found(
        self,
        layout: LatentLayout,
        conditions: Conditions = NO_CONDITIONS,
        *,
        anew: bool = False,
        plain: bool = False,
    ) -> Recognised | Probed | Unrecognised:
        """What is known about an energy that is no EnergyMLP, under such conditions."""
        net = self.net
        if not isinstance(net, nn.Module):
            return Unrecognised("it is a plain callable; pass the nn.Module, or a method of it, to have it examined")
        if nn.utils.parametrize._cache_enabled:  # it would keep weights that were computed without gradients
            return Unrecognised("inside torch.nn.utils.parametrize.cached() its weights are computed for autograd")
        method = self.method
        if method != "forward" and getattr(type(net), method, None) is not self.energy.__func__:
            return Unrecognised(f"{method} is no method of the class {type(net).__name__}")
        return recognised(net, layout, method, conditions, anew=anew, plain=plain)

    def _check_takes(self, given: Conditions) -> None:
        """Whether the energy has arguments of those names, as far as Python can tell.

        Raises:
            ValueError: it has none of a name.
        """
        net = self.net
        function = self.energy if self.method != "forward" or not isinstance(net, nn.Module) else net.forward
        try:
            parameters = inspect.signature(function).parameters
        except (TypeError, ValueError):
            return
        kinds = {parameter.kind for parameter in parameters.values()}
        missing = [name for name in given.options if name not in parameters]
        if missing and inspect.Parameter.VAR_KEYWORD not in kinds:
            raise ValueError(
                f"{missing[0]} is passed to the energy as {missing[0]}=, which {self.name()} does not take: its "
                f"arguments are ({', '.join(parameters)}); give a module whose forward(z, {missing[0]}) calls it"
            )

    def _check_width(self, flat: Tensor, layout: LatentLayout, given: Conditions) -> None:
        """Whether the energy takes latents so wide, as far as its layers tell.

        Raises:
            ValueError: it does not, and would be an MLP of latents of another width.
        """
        net = self.net
        entry = examined(net, layout, self.method, given) if isinstance(net, nn.Module) else None
        raised = entry is not None and isinstance(entry.found, Unrecognised) and entry.found.raised
        if not raised or len(layout.dims) > 1 or capturing(flat.device):
            return
        try:
            with torch.no_grad():
                self.callable()(layout.restore(flat), **given.options)
        except FORWARD_ERRORS as error:
            width = next((layer.in_features for layer in net.modules() if isinstance(layer, nn.Linear)), layout.dim)
            if width == layout.dim or isinstance(self.found(layout._replace(dims=(width,)), given), Unrecognised):
                return  # what it raises comes when it runs
            raise ValueError(
                f"z must be [chains, {width}] for this {type(net).__name__}, got {describe(flat)}: give latents as "
                f"wide as its first layer takes, or a module whose first layer takes {layout.dim} ({error})"
            ) from error

    def _read(
        self, flat: Tensor, layout: LatentLayout, given: Conditions, sign: float, n_steps: int
    ) -> tuple[Recognised | Probed, MLP, Quadratic | None] | None:
        """What was found, and sign times what it is now, seen to agree with the forward; None for autograd."""
        why = "its forward takes another path at every call"
        for anew in (False, True):
            found = self.found(layout, given, anew=anew)
            if isinstance(found, Unrecognised) or (isinstance(found, Probed) and not _is_worth(found, flat, n_steps)):
                return None
            if not isinstance(found, Probed):
                mlp = found.mlp(1.0, given.options.get("context"))
                if flat.dtype is not mlp.weights[0].dtype or self._copy_agrees(found, flat, layout, given):
                    return found, _signed(mlp, sign), None
            else:
                before = self._versions()
                try:
                    mlp, quadratic = found.mlp(given)
                except OtherPath:
                    continue
                except FORWARD_ERRORS:
                    return None
                if not all(weight.dtype is flat.dtype and weight.device == flat.device for weight in mlp.weights):
                    return None
                # parameters that another thread changed between the two cannot be compared, and prove nothing
                agreed = self._run_agrees(found, mlp, quadratic, flat, layout, given)
                if agreed or before != self._versions():
                    return found, _signed(mlp, sign), None if quadratic is None else quadratic.times(sign)
            why = "at these latents it raises, or has another value or gradient than the MLP read out of it"
        give_up_on(self.net, layout, self.method, given, why)
        return None

    def _versions(self) -> tuple[int, ...]:
        """How often each parameter and buffer was written into."""
        net = self.net
        tensors = itertools.chain(net.parameters(), net.buffers())
        # what was made inside torch.inference_mode does not count, and is written into inside it alone
        return tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)

    def _run_agrees(
        self,
        found: Probed,
        mlp: MLP,
        quadratic: Quadratic | None,
        flat: Tensor,
        layout: LatentLayout,
        given: Conditions,
    ) -> bool:
        """Whether what a run of the forward showed has the forward's own value and gradient at these latents."""
        if not flat.shape[0] or capturing(flat.device):
            return True
        try:
            return agrees(found.forward, layout, mlp, quadratic, flat, given)
        except FORWARD_ERRORS:
            return False

    def _copy_agrees(self, found: Recognised, flat: Tensor, layout: LatentLayout, given: Conditions) -> bool:
        """Whether parameters read where they stand give the forward's own value and gradient: asked once for each
        number of chains, of a copy, whose parameters nobody else changes and whose attributes its forward may write."""
        chains = flat.shape[0]
        counts = examined(self.net, layout, self.method, given).counts
        if not chains or capturing(flat.device) or chains in counts:
            return True
        try:
            twin = copy_of(self.net)
            mlp = Recognised(twin, found.structure).mlp(1.0, given.options.get("context"))
            agreed = agrees(Forward(twin, self.method), layout, mlp, None, flat, given)
        except FORWARD_ERRORS:
            return False
        if agreed and len(counts) < _MOST_COUNTS:
            counts.add(chains)
        return agreed

    def reason(self, flat: Tensor, layout: LatentLayout, context: object, y: object) -> str:
        found = self.found(layout, conditions(flat, context, y))
        if isinstance(found, Unrecognised):
            return found.reason
        if isinstance(found, Probed):
            return (
                f"it is one, {flat.shape[0]} chains of so few steps are not worth a run of its forward on {found.rows} "
                "rows for its parameters, or these are of another type than z"
            )
        return ""

    def how(self, flat: Tensor, layout: LatentLayout, context: object, y: object) -> tuple[int, list[str]]:
        """Of how many networks a recognised module is the sum, and what else there is to say of its parameters."""
        found = None if is_plain_energy_mlp(self.net) else self.found(layout, conditions(flat, context, y))
        if found is None or isinstance(found, Unrecognised):
            return 1, []
        said = []
        if isinstance(found, Probed):
            why = "" if found.why is None else f", because its code looks at {found.why}"
            said.append(f"parameters by a run of its own forward on {found.rows} rows per call{why}")
        if self.norms(layout, conditions(flat, context, y)):
            said.append("spectral norms as they converge, to which the module's own come by their power iterations")
        return found.n_terms, said

    def examinations(self, flat: Tensor, layout: LatentLayout, context: object, y: object) -> tuple[int, str | None]:
        """How often the module was examined for such latents, and what had changed before the latest time."""
        net = self.net
        entry = None
        if isinstance(net, nn.Module):
            entry = examined(net, layout, self.method, conditions(flat, context, y))
        return (0, None) if entry is None else (entry.times, entry.change)

    def mlp(
        self,
        flat: Tensor,
        layout: LatentLayout,
        context: Tensor | None,
        y: Tensor | int | None,
        sign: float,
        n_steps: int = 0,
    ) -> tuple[MLP | None, Quadratic | None]:
        """sign · energy as the operations take it for so many steps, with the parameters of this moment: a network, and
        what is added to that of z alone; (None, None) for autograd.

        Raises:
            ValueError: z, context or y does not fit the energy.
        """
        net = self.energy if type(self.energy) is EnergyMLP else self.net
        self.was_mlp = False
        if is_plain_energy_mlp(net) and self.method == "forward":
            mlp = self._energy_mlp(net, flat, layout, context, y, sign)
            self.was_mlp = True
            return mlp, None
        given = conditions(flat, context, y)
        read = self._read(flat, layout, given, sign, n_steps)
        if read is None:
            if given.options:
                self._check_takes(given)
            self._check_width(flat, layout, given)
            return None, None
        found, mlp, quadratic = read
        if context is None and y is None:
            self._remember(found, layout, net.training)
        self.was_mlp = True
        weight = mlp.weights[0]
        if weight.dtype not in SUPPORTED_DTYPES:
            raise ValueError(f"parameters of the energy must be float32 or float64, got {dtype_name(weight.dtype)}")
        if weight.dtype != flat.dtype or weight.device != flat.device:
            raise ValueError(
                f"z must be [chains, {mlp.spec.dim}] {dtype_name(weight.dtype)} on {weight.device}, "
                f"got {describe(flat)}"
            )
        return mlp, quadratic

    def plain_mlp(self, layout: LatentLayout, sign: float, widest: int, chains: int) -> MLP | None:
        """`mlp` on the CPU without context or chosen logit, in any mode of the caller's; None where it takes more than
        that, or has a layer wider than `widest`. Not yet compared with z; its tensors are for `cpu_plain.py`, which
        reads no more than their memory."""
        net = self.energy if type(self.energy) is EnergyMLP else self.net
        if runs_energy_mlp_forward(net) and self.method == "forward":
            if net.context_dim or net.spec.widest > widest or net.spec.head == "logit":
                return None
            if net.layers[0].weight.dtype not in SUPPORTED_DTYPES:
                return None  # refused in words on the longer way
            if layout.container is not Tensor and layout.dims != net.latent_dims:
                return None
            parameters = net.parameters_as_they_are()
            if parameters is not None:
                return MLP(net.spec if sign == 1.0 else net.spec.negated, *parameters)
            if is_plain_energy_mlp(net):
                with chain_mode(_CPU):
                    return _signed(net.mlp(None), sign)
        found = self.found(layout, plain=True)
        if isinstance(found, Unrecognised):
            self.was_mlp = False
            return None
        # on the longer way it is compared with the forward
        if isinstance(found, Probed) or found.spec.widest > widest:
            return None
        if chains not in examined(self.net, layout, self.method, NO_CONDITIONS).counts:
            return None
        self._remember(found, layout, net.training)
        return found.plain_mlp(sign)

    def _energy_mlp(
        self,
        net: EnergyMLP,
        flat: Tensor,
        layout: LatentLayout,
        context: Tensor | None,
        y: Tensor | int | None,
        sign: float,
    ) -> MLP:
        if layout.container is not Tensor and layout.dims != net.latent_dims:
            raise ValueError(f"z must be layers of widths {net.latent_dims}, got {layout.dims}")
        net.check_z(flat)
        # the parameters themselves where possible: a chain runs outside autograd
        return _signed(net.mlp(flat, context, y), sign)


def _signed(mlp: MLP, sign: float) -> MLP:
    return mlp if sign == 1.0 else mlp._replace(spec=mlp.spec.negated)


def is_plain_energy_mlp(net: object) -> bool:
    """An EnergyMLP whose forward is EnergyMLP's: no subclass that changes it, no hook, no foreign normalisation."""
    # a parametrised layer is of a class of its own
    return runs_energy_mlp_forward(net) and set(map(type, net._modules["layers"]._modules.values())) == {EnergyLinear}


def runs_energy_mlp_forward(net: object) -> bool:
    """An EnergyMLP whose forward is EnergyMLP's, called as any module's is, without a hook; its layers may be
    parametrised."""
    if not isinstance(net, EnergyMLP) or type(net).forward is not EnergyMLP.forward or "forward" in net.__dict__:
        return False
    if type(net).__call__ is not nn.Module.__call__:
        return False
    hooked = net._forward_hooks or net._forward_pre_hooks or net._backward_hooks or net._backward_pre_hooks
    return not (hooked or any(HOOKS_OF_ALL))


def _is_worth(found: Probed, flat: Tensor, n_steps: int) -> bool:
    """Whether a chain takes more evaluations than the run of the forward that reads its parameters has rows."""
    return flat.shape[0] * n_steps >= found.rows


def conditions(flat: Tensor, context: object, y: object) -> Conditions:
    """What an energy of the chains [chains, dim] is called with besides z."""
    if context is None and y is None:
        return NO_CONDITIONS
    given = {name: value for name, value in (("context", context), ("y", y)) if value is not None}
    return Conditions.of(given, flat.shape[0])
