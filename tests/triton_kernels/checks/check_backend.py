"""The backend as users meet it: choice, reasons, explain, the public calls, tile overrides."""

import pytest
import torch

import jlebm_fast as jf
from jlebm_fast.backends import triton as backend
from jlebm_fast.backends.triton_kernels import tiles
from jlebm_fast.problem import MLPSpec


def test_listed_with_the_device_it_serves():
    (status,) = (s for s in jf.available_backends() if s.name == "triton")
    assert status.available
    assert status.devices == ("cpu",)
    assert "interpreter" in status.build


def test_auto_on_the_cpu_does_not_take_it():
    z = torch.zeros(2, 4)
    text = jf.FastLangevin(jf.EnergyMLP(4, 5, 1)).explain(z)
    assert "backend   triton" not in text
    assert "interpreter" in jf.FastLangevin(jf.EnergyMLP(4, 5, 1), backend="triton").explain(z)


def test_sampling_through_the_front_door():
    f = jf.EnergyMLP((2, 3), 8, 2, spectral_norm=True)
    zs = [torch.randn(5, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(5, 3)]
    ends = []
    for name in ("triton", "eager"):
        prior = jf.FastLangevin(f, n_steps=3, backend=name)
        end, info = prior.sample(zs, noise_key=5, return_info=True, mask=[True, False])
        ends.append(torch.cat([*end, info.energy.T, info.grad_norm.T], dim=1))
    assert torch.allclose(*ends, rtol=0, atol=1e-5)
    noise = [jf.langevin_noise(3, 2, 4, 5, backend=name) for name in ("triton", "eager")]
    assert torch.equal(*noise)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"dtype": torch.float64, "device": torch.device("cpu")}, "float64 runs on backend 'eager'"),
        ({"dtype": torch.float32, "device": torch.device("meta")}, "CPU tensors, got meta"),
        (
            {
                "dtype": torch.float32,
                "device": torch.device("cpu"),
                "spec": MLPSpec((3, 4, 2000), ("relu",), (0.0,), "logsumexp"),
            },
            "up to 1024 logits, the energy has 2000",
        ),
    ],
)
def test_reasons(arguments, reason):
    assert reason in backend.unsupported_reason("mlp_energy_grad", **arguments)


def test_regimes_are_told():
    small = MLPSpec((4, 5, 1), ("relu",), (0.0,))
    wide = MLPSpec((4, 2000, 2000, 1), ("relu",) * 2, (0.0,) * 2)
    assert backend.regime("mlp_langevin_chain", small).startswith("resident")
    assert backend.regime("mlp_langevin_chain", wide).startswith("streamed")
    assert "interpreter" in backend.regime("langevin_noise", None)


def test_limits_agree():
    assert backend._MOST_LOGITS == tiles.MOST_LOGITS


def test_overrides(monkeypatch):
    spec = MLPSpec((4, 5, 1), ("relu",), (0.0,))
    chip = tiles.Chip("cuda", 9, 232448, 132)
    chosen = tiles.choose(spec, 100, "tf32", chip)
    assert chosen.regime == "resident"
    with tiles.override(regime="streamed", block_chains=32):
        inner = tiles.choose(spec, 100, "tf32", chip)
        assert inner[:2] == ("streamed", 32)
    assert tiles.choose(spec, 100, "tf32", chip) == chosen
    monkeypatch.setenv(tiles.VARIABLE, "regime=streamed num_warps=8 num_stages=2")
    assert tiles.choose(spec, 100, "tf32", chip)._replace(block_out=0, block_in=0) == ("streamed", 16, 8, 0, 0, 2)
    monkeypatch.setenv(tiles.VARIABLE, "num_warps=3")
    with pytest.raises(ValueError, match="num_warps must be 1, 2, 4, 8 or 16, got num_warps=3"):
        tiles.choose(spec, 100, "tf32", chip)


@pytest.mark.parametrize("fields", [{"block_chains": 24}, {"tile": 3}, {"regime": "fast"}, {"num_stages": 0}])
def test_wrong_overrides(fields):
    with pytest.raises(ValueError, match="tile override"), tiles.override(**fields):
        pass


def test_an_override_with_more_threads_than_elements_is_refused():
    spec = MLPSpec((4, 5, 1), ("relu",), (0.0,))
    for kind, warps in (("cuda", 16), ("hip", 8)):
        chip = tiles.Chip(kind, 9, 65536, 132)
        small = {"regime": "streamed", "block_chains": 16, "block_out": 16}
        with tiles.override(**small, num_warps=warps), pytest.raises(ValueError, match=r"512 threads, got 16 \* 16"):
            tiles.choose(spec, 100, "bf16", chip)
        with tiles.override(**small, num_warps=warps // 2):
            assert tiles.choose(spec, 100, "bf16", chip).num_warps == warps // 2


def test_what_was_measured_goes_before_the_estimate(monkeypatch):
    spec = MLPSpec((100, 200, 200, 1), ("gelu",) * 2, (0.0,) * 2)
    chip = tiles.Chip("cuda", 9, 232448, 132)
    row = ("streamed", 16, 4, 64, 64, 4)
    before = tiles.choose(spec, 100, "tf32x3", chip)
    assert before != row
    monkeypatch.setitem(tiles.MEASURED, tiles.shape_class(spec.widths, 100, "tf32x3", chip), row)
    tiles._choose.cache_clear()
    try:
        assert tiles.choose(spec, 100, "tf32x3", chip) == row
        near = MLPSpec((90, 210, 180, 1), ("gelu",) * 2, (0.0,) * 2)
        assert tiles.choose(near, 1, "tf32x3", chip) == row
        # a chip, precision, number of chains or operation that was not measured
        assert tiles.choose(spec, 100, "tf32x3", chip._replace(capability=8)) != row
        assert tiles.choose(spec, 100, "tf32", chip) != row
        assert tiles.choose(spec, 10_000, "tf32x3", chip) != row
        assert tiles.choose(spec, 100, "tf32x3", chip, op="mlp_energy_grad") != row
        with tiles.override(num_stages=2):
            assert tiles.choose(spec, 100, "tf32x3", chip) == (*row[:5], 2)
        with tiles.override(regime="resident"):
            assert tiles.choose(spec, 100, "tf32x3", chip).num_stages == 1
    finally:
        tiles._choose.cache_clear()


def test_measured_rows_are_tiles():
    for key, row in tiles.MEASURED.items():
        kind, capability, products, padded, how_many = key
        assert kind in ("cuda", "hip")
        assert isinstance(capability, int)
        assert products in tiles.BYTES
        assert all(width >= 16 for width in padded[:-1])
        assert how_many in ("few", "some", "many")
        with tiles.override(**tiles.Tiles(*row)._asdict()):
            pass
