"""jlebm_fast.compat beside loops written the way those codes write them: float32, 60 steps, the same noise."""

import copy
import dataclasses
import gc
import itertools
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import jlebm_fast as jf
from jlebm_fast.recognition import examining
from jlebm_fast.rng import draw_noise_key

DIMS = (2, 2, 2, 10)
STEPS, CHAINS = 60, 100


def normal(*shape, seed=91):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def noise_of_the_next_call(dim):
    """The noise that a call under the present state of torch's generator will use; leaves the state as it was."""
    state = torch.get_rng_state()
    eps = jf.langevin_noise(draw_noise_key(), STEPS, CHAINS, dim)
    torch.set_rng_state(state)
    return eps


class JointEnergy(nn.Module):
    """f([z_1 … z_L]) as the joint prior's code has it: an MLP on the concatenation, optionally with spectral norm."""

    def __init__(self, norm):
        super().__init__()
        wrap = nn.utils.spectral_norm if norm else (lambda m: m)
        widths = (sum(DIMS), 50, 50, 50, 50)
        layers = []
        for a, b in itertools.pairwise(widths):
            layers += [wrap(nn.Linear(a, b)), nn.LeakyReLU(0.2)]
        self.energy = nn.Sequential(*layers, wrap(nn.Linear(50, 1)))

    def forward(self, zs):
        return self.energy(torch.cat(zs, dim=1))


def joint_loop(zs, f, step_size, noise):
    """Layer by layer: z_i <- z_i + s²/2 (∂f/∂z_i − z_i) + s eps."""
    zs = [z.clone().detach().requires_grad_(True) for z in zs]
    for eps in noise:
        grads = torch.autograd.grad(f(zs).sum(), zs)
        for z, grad, e in zip(zs, grads, eps.split(DIMS, dim=1), strict=True):
            z.data = z.data + 0.5 * step_size * step_size * (grad - z.data)
            z.data += step_size * e
    return [z.detach() for z in zs]


@pytest.mark.parametrize("norm", [False, True])
def test_joint_prior(norm):
    torch.manual_seed(1)
    f = JointEnergy(norm)
    for _ in range(300 if norm else 0):  # a norm that has converged, as after any training
        f([normal(1, d) for d in DIMS])
    f.eval()
    zs = [normal(CHAINS, d, seed=d + i) for i, d in enumerate(DIMS)]
    args = SimpleNamespace(e_l_steps=STEPS, e_l_step_size=0.4)
    torch.manual_seed(2)
    expected = joint_loop(zs, f, 0.4, noise_of_the_next_call(sum(DIMS)))
    ours = jf.compat.langevin_prior(zs, f, args, should_print=False)
    assert [z.shape for z in ours] == [z.shape for z in zs]
    assert (torch.cat(ours, 1) - torch.cat(expected, 1)).abs().max() <= 1e-5


def test_joint_prior_with_the_published_power_iteration():
    """A norm that has not converged, iterated in every step of the chain: what nobody's .eval() gives."""
    torch.manual_seed(1)
    f, twin = JointEnergy(True), JointEnergy(True)
    twin.load_state_dict(f.state_dict())
    with torch.no_grad():
        for layer in (*f.energy, *twin.energy):
            if isinstance(layer, nn.Linear):
                layer.bias.mul_(0.5)
    zs = [normal(CHAINS, d, seed=d + i) for i, d in enumerate(DIMS)]
    args = {"e_l_steps": STEPS, "e_l_step_size": 0.4}
    torch.manual_seed(2)
    noise = noise_of_the_next_call(sum(DIMS))
    expected = joint_loop(zs, twin, 0.4, noise)
    ours = jf.compat.langevin_prior(zs, lambda zs: f(zs), args, should_print=False)
    assert (torch.cat(ours, 1) - torch.cat(expected, 1)).abs().max() <= 1e-5
    for name, buffer in f.named_buffers():
        torch.testing.assert_close(buffer, dict(twin.named_buffers())[name], rtol=1e-4, atol=1e-5)
    frozen = jf.compat.langevin_prior(zs, f, args, should_print=False)
    assert not torch.allclose(torch.cat(frozen, 1), torch.cat(ours, 1), atol=1e-3)


FORMS = {
    "identity": lambda score: score,
    "tanh": lambda score: torch.tanh(-score),
    "sigmoid": torch.sigmoid,
    "softplus": nn.functional.softplus,
}


def latent_loop(z, net, form, args, noise):
    """z <- z − s²/2 ∂(E(z) + ‖z‖²/(2 sig²))/∂z + s eps, on [chains, dim, 1, 1]; and the norm of the last ∇E."""
    z = z.clone().detach().requires_grad_(True)
    s, norm = args.e_l_step_size, None
    for eps in noise:
        (grad,) = torch.autograd.grad(FORMS[form](net(z)).sum(), z)
        norm = grad.view(len(z), -1).norm(dim=1).mean()
        z.data = z.data - 0.5 * s * s * (grad + 1.0 / (args.e_prior_sig * args.e_prior_sig) * z.data)
        if args.e_l_with_noise:
            z.data += s * eps.view_as(z)
    return z.detach(), norm


class LatentEnergy(nn.Module):
    """The LEBM code's score network on [chains, dim, 1, 1]."""

    def __init__(self, activation):
        super().__init__()
        self.ebm = nn.Sequential(nn.Linear(100, 200), activation, nn.Linear(200, 200), activation, nn.Linear(200, 1))

    def forward(self, z):
        return self.ebm(z.squeeze()).view(-1, 1, 1, 1)


def nearest_kink(z, net, form, args, noise):
    """The smallest |pre-activation| that each chain of the loop meets; [chains]."""
    nearest = torch.full((len(z),), torch.inf, dtype=z.dtype)

    def note(module, inputs):
        torch.minimum(nearest, inputs[0].detach().abs().amin(1), out=nearest)

    hooks = [m.register_forward_pre_hook(note) for m in net.ebm if isinstance(m, nn.LeakyReLU)]
    latent_loop(z, net, form, args, noise)
    for hook in hooks:
        hook.remove()
    return nearest


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", [nn.GELU(), nn.LeakyReLU(0.2)], ids=["gelu", "leaky_relu"])
@pytest.mark.parametrize("with_noise", [True, False])
def test_latent_prior(form, activation, with_noise):
    torch.manual_seed(3)
    net, z = LatentEnergy(activation), normal(CHAINS, 100, 1, 1)
    args = SimpleNamespace(
        e_l_steps=STEPS, e_l_step_size=0.4, e_prior_sig=1.0, e_l_with_noise=with_noise, e_energy_form=form
    )
    torch.manual_seed(4)
    expected, norm = latent_loop(z, net, form, args, noise_of_the_next_call(100))
    ours, our_norm = jf.compat.sample_langevin_prior_z(z, net, args)
    assert ours.shape == z.shape
    off = (ours - expected).abs().flatten(1).amax(1)
    sure = torch.ones(CHAINS, dtype=torch.bool)
    if isinstance(activation, nn.LeakyReLU):
        # at the kink the last bit of a pre-activation decides between two slopes, and either is right
        torch.manual_seed(4)
        noise = noise_of_the_next_call(100)
        sure = nearest_kink(z.double(), net.double(), form, args, noise.double()) > 1e-6
        assert sure.float().mean() >= 0.5
    assert off[sure].max() <= 1e-5
    assert off.max() <= 1e-3
    torch.testing.assert_close(our_norm, norm, rtol=1e-4, atol=1e-6)


FORM_ARGS = {"e_l_steps": 3, "e_l_step_size": 0.4, "e_energy_form": "tanh"}


def score_net():
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 1))


def test_a_net_that_nobody_holds_is_freed():
    net = score_net()
    jf.compat.sample_langevin_prior_z(normal(4, 5), net, FORM_ARGS)
    gone, weight_gone = weakref.ref(net), weakref.ref(net[0].weight)
    del net
    gc.collect()
    assert gone() is None
    assert weight_gone() is None


def test_a_net_is_examined_once_for_each_form(monkeypatch):
    examined = []
    recognise = examining.recognise
    monkeypatch.setattr(examining, "recognise", lambda *a, **k: examined.append(1) or recognise(*a, **k))
    net, other, z = score_net(), score_net(), normal(4, 5)
    for _ in range(3):
        for form in ("tanh", "softplus"):
            for one in (net, other):
                jf.compat.sample_langevin_prior_z(z, one, {**FORM_ARGS, "e_energy_form": form})
    assert len(examined) == 4


def test_a_changed_net_is_followed():
    net, z = score_net(), normal(4, 5)
    still = {**FORM_ARGS, "e_l_with_noise": False}
    before = jf.compat.sample_langevin_prior_z(z, net, still)[0]
    with torch.no_grad():
        net[0].weight.mul_(2.0)
    net[1] = nn.SiLU()
    changed = jf.compat.sample_langevin_prior_z(z, net, still)[0]
    assert not torch.allclose(before, changed)
    torch.testing.assert_close(changed, jf.compat.sample_langevin_prior_z(z, copy.deepcopy(net), still)[0])


@dataclasses.dataclass
class Unhashable:
    scale: float

    def __call__(self, z):
        return self.scale * z.square().sum(dim=1)


class Slotted:
    __slots__ = ()

    def __call__(self, z):
        return 0.5 * z.square().sum(dim=1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("energy", [Unhashable(0.5), Slotted()], ids=["unhashable", "without weak references"])
def test_any_callable_is_an_energy(form, energy):
    z, args = normal(4, 5), {**FORM_ARGS, "e_energy_form": form, "e_l_with_noise": False}
    ours = jf.compat.sample_langevin_prior_z(z, energy, args)[0]
    expected, _ = latent_loop(
        z[..., None, None], lambda z: energy(z.flatten(1)), form,
        SimpleNamespace(**args, e_prior_sig=1.0), torch.zeros(3, 4, 5),
    )  # fmt: skip
    torch.testing.assert_close(ours, expected.flatten(1))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_net_runs():
    torch.manual_seed(5)
    net, z, still = score_net(), normal(4, 5), {**FORM_ARGS, "e_l_with_noise": False}
    scripted = torch.jit.trace(net, normal(4, 5))
    ours = jf.compat.sample_langevin_prior_z(z, scripted, still)[0]
    torch.testing.assert_close(ours, jf.compat.sample_langevin_prior_z(z, net, still)[0], rtol=0, atol=1e-5)
