"""Backends: the list, the choice by reasons, the import without anything compiled, the certificate, the examples."""

import doctest
import importlib
import pkgutil
import subprocess
import sys

import pytest
import torch
from torch import nn

import jlebm_fast as jf
from jlebm_fast import backends

CORE = [
    name
    for name in (m.name for m in pkgutil.iter_modules(jf.__path__))
    if name not in ("_C", "__main__", "bench", "cli", "models", "training")
]


def test_the_list_names_devices_build_or_remedy():
    listed = jf.available_backends()
    assert [status.name for status in listed] == ["cuda", "triton", "cpu", "eager"]
    for status in listed:
        assert status.available == (status.reason is None) == bool(status.devices) == bool(status.build)
        assert status.name in str(listed)
        if status.reason:
            assert status.reason in str(listed)


def test_auto_takes_the_first_that_can(backend):
    f = jf.EnergyMLP(4, 5, 1)
    text = jf.FastLangevin(f, backend=backend.name).explain(torch.zeros(2, 4))
    if backend.device == "cpu":
        assert f"backend   {backend.name} " in text
    wide = jf.FastLangevin(f.double()).explain(torch.zeros(2, 4, dtype=torch.float64))
    assert "backend   eager" in wide
    assert "float64" in wide


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_named_backend_that_cannot_serve_says_why(name):
    z = torch.zeros(2, 4)
    for call in (
        lambda: jf.FastLangevin(jf.EnergyMLP(4, 5, 1), backend=name)(z),
        lambda: jf.FastLangevin(lambda z: z.sum(1), backend=name)(z),
        lambda: jf.energy_and_grad(lambda z: z.sum(1), z, backend=name),
        lambda: jf.langevin_step(z, z, backend=name),
        lambda: jf.langevin_noise(1, 1, 1, 1, backend=name),
    ):
        with pytest.raises(ValueError, match=f"backend '{name}' cannot run .*: "):
            call()


WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in ("jlebm_fast._C", "triton"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in ("jlebm_fast._C", "triton") else real(name, *rest)
import torch
from torch import nn
torch_alone = set(sys.modules)
import jlebm_fast as jf
f = jf.EnergyMLP((2, 3), 8, 2)
prior = jf.FastLangevin(f, n_steps=3)
prior([torch.zeros(4, 2), torch.zeros(4, 3)])
cpu = jf.available_backends()[2]
assert not cpu.available and "pip install" in cpu.reason, cpu
text = prior.explain(torch.zeros(4, 5))
assert "backend   eager" in text and cpu.reason in text, text
try:
    jf.FastLangevin(f, backend="cpu")(torch.zeros(4, 5))
except ValueError as error:
    assert "backend 'cpu' cannot run mlp_langevin_chain" in str(error) and "pip install" in str(error), error
else:
    raise SystemExit("a missing backend was replaced without a word")
optional = ("triton", "tyro", "tqdm", "matplotlib", "datasets", "sklearn", "scipy", "jax", "safetensors", "PIL")
assert not [name for name in optional if name in sys.modules and name not in torch_alone]
"""


def test_without_the_compiled_module_eager_serves_and_the_rest_is_named():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_import_brings_no_extra():
    script = (
        "import sys, torch, numpy; torch_alone = set(sys.modules); import jlebm_fast; "
        "print([n for n in ('triton', 'tyro', 'tqdm', 'matplotlib', 'datasets', 'sklearn', 'scipy', 'jax') "
        "if n in sys.modules and n not in torch_alone])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_backend_offers_the_same():
    for status in jf.available_backends():
        if status.available:
            module = backends.load(status.name)
            assert status.name == module.NAME
            for name in (*backends.OPS, "unavailable_reason", "unsupported_reason", "regime", "build"):
                assert callable(getattr(module, name)), (status.name, name)


@pytest.mark.parametrize(
    "make",
    [
        lambda: (jf.EnergyMLP((2, 3), 16, 2, spectral_norm=True), None),
        lambda: (torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.GELU(), torch.nn.Linear(8, 1)), torch.zeros(9, 5)),
        lambda: (
            torch.nn.Sequential(
                torch.nn.utils.spectral_norm(torch.nn.Linear(5, 8)),
                torch.nn.GELU(),
                torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(8, 1)),
            ).eval(),
            torch.ones(9, 5),
        ),
        lambda: (lambda z: -(z**4).sum(1), torch.ones(9, 5)),
        lambda: (jf.FastLangevin(jf.EnergyMLP(5, 8, 1), n_steps=4, step_size=torch.full((3,), 0.2)), None),
        lambda: (jf.FastLangevin(jf.EnergyMLP(5, 8, 1), n_steps=30, step_size=0.1, maximize=False), None),
    ],
)
def test_certificates_of_sound_energies_pass(make, capsys):
    energy, z = make()
    certificate = jf.verify(energy, z)
    assert certificate.passed, str(certificate)
    assert capsys.readouterr().out.strip() == str(certificate)
    served = {status.name for status in jf.available_backends() if status.available and "cpu" in status.devices}
    assert {check.backend for check in certificate.checks} == served
    assert {name for name, _ in certificate.missing} == set(backends.NAMES) - served


def test_certificates_of_conditional_energies():
    f = jf.EnergyMLP(5, 8, 1, context_dim=2, out_features=3, head="logsumexp")
    z, c = torch.randn(9, 5), torch.randn(9, 2)
    assert jf.verify(f, z, context=c, show=False).passed
    assert jf.verify(f, z, context=c, y=1, show=False).passed
    with pytest.raises(ValueError, match="context must be"):
        jf.verify(f, z)


def test_a_wrong_kernel_fails_the_certificate(monkeypatch):
    from jlebm_fast.backends import eager

    right = eager._updated

    def too_much_noise(z, grad, update, step):
        return right(z, grad, update._replace(step_coefficients=update.step_coefficients * 1.05), step)

    monkeypatch.setattr(eager, "_updated", too_much_noise)
    certificate = jf.verify(jf.EnergyMLP(16, 8, 1), show=False)
    failed = {(check.name, check.backend) for check in certificate.checks if not check.passed}
    assert ("law", "eager") in failed
    assert "certificate: FAILED" in str(certificate)


def test_an_energy_mlp_is_not_examined_as_somebodys_module():
    f, z = jf.EnergyMLP(4, 8, 1), torch.randn(5, 4)
    jf.FastLangevin(f).sample(z)
    assert "examined" not in jf.verify(f, z, show=False).explanation


@pytest.mark.parametrize("kind", ["own", "torch's", "read by a run"])
def test_verify_holds_spectral_norms_against_exact_ones(kind, monkeypatch):
    f = jf.EnergyMLP(6, 8, 2, spectral_norm=True)
    if kind != "own":
        layers = [torch.nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)), nn.GELU(), nn.Linear(8, 1)]
        f = nn.Sequential(*layers)
    if kind == "read by a run":
        f = WithGaussian(f)
    z = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    certificate = jf.verify(f, z, show=False)
    (norm,) = (check for check in certificate.checks if check.name == "norm")
    assert certificate.passed
    assert f"{3 if kind == 'own' else 1} norms" in norm.detail
    exact = torch.linalg.matrix_norm
    monkeypatch.setattr(torch.linalg, "matrix_norm", lambda w, order: 1.01 * exact(w, order))
    assert not jf.verify(f, z, show=False).passed


class WithGaussian(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, z):
        return self.net(z) - 0.5 * z.square().sum(1, keepdim=True)


def test_verify_needs_to_know_the_latents():
    with pytest.raises(ValueError, match="z must be given"):
        jf.verify(lambda z: z.sum(1))


@pytest.mark.parametrize("name", ["__init__", *CORE])
def test_examples_run(name):
    module = jf if name == "__init__" else importlib.import_module(f"jlebm_fast.{name}")
    assert doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


def test_public_functions_have_examples():
    finder = doctest.DocTestFinder()
    for public in (
        jf.EnergyMLP,
        jf.EnergyMLP.from_module,
        jf.FastLangevin,
        jf.FastLangevin.sample,
        jf.FastLangevin.explain,
        jf.GaussianPrior,
        jf.available_backends,
        jf.compat.langevin_prior,
        jf.compat.sample_langevin_prior_z,
        jf.energy_and_grad,
        jf.langevin_noise,
        jf.langevin_step,
        jf.verify,
    ):
        assert any(test.examples for test in finder.find(public)), public
