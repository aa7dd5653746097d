"""Fast Langevin sampling of joint latent energy-based priors.

>>> import torch, jlebm_fast as jf
>>> f = jf.EnergyMLP(latent_dims=(2, 2, 2, 10), hidden=50, depth=4, spectral_norm=True)
>>> prior = jf.FastLangevin(f, n_steps=60, step_size=0.4)
>>> z = prior([torch.randn(100, d) for d in (2, 2, 2, 10)])
"""

from . import compat, registration  # noqa: F401  importing it registers torch.ops.jlebm_fast
from .dynamics import GaussianPrior
from .energy import EnergyMLP
from .functional import energy_and_grad, langevin_noise, langevin_step
from .metropolis import MALAInfo, mala
from .sampler import FastLangevin, LangevinInfo
from .status import available_backends
from .verification import verify

__version__ = "0.1.0"

__all__ = [
    "EnergyMLP",
    "FastLangevin",
    "GaussianPrior",
    "LangevinInfo",
    "MALAInfo",
    "__version__",
    "available_backends",
    "compat",
    "energy_and_grad",
    "langevin_noise",
    "langevin_step",
    "mala",
    "verify",
]
