"""A captured step: with a stand-in for the CUDA graph whose replay runs the step's function on the same memory."""

import contextlib
import gc

import pytest
import torch
from torch import nn

import jlebm_fast as jf
from jlebm_fast import captured, energy, rng
from jlebm_fast import sampler as sampler_module
from jlebm_fast.captured import CudaCapture, can_capture


class Replayed:
    """Keeps the rules of torch.cuda.graph: recording computes nothing yet, a replay writes where the step wrote."""

    def __init__(self):
        self.calls = []

    def first(self, run):
        self.calls.append("first")
        run()

    def record(self, run):
        self.calls.append("record")

        def replay():
            self.calls.append("replay")
            run()

        return replay


def normal(*shape, seed=101):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def capture(monkeypatch):
    replayed = Replayed()
    wanted = lambda z, n_steps, wanted: replayed if wanted and n_steps >= 3 else None  # noqa: E731
    monkeypatch.setattr(sampler_module, "capture_of", wanted)
    return replayed


class Decoder(nn.Module):
    """A decoder with a running mean: it must see every step exactly once."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.GELU(), nn.Linear(12, 5))

    def forward(self, z):
        return self.net(z)


@pytest.mark.parametrize("recognised", [True, False])
@pytest.mark.parametrize("noise", ["key", "given"])
@pytest.mark.parametrize("n_steps", [3, 8])
def test_a_captured_chain_is_the_chain(backend, capture, recognised, noise, n_steps):
    torch.manual_seed(1)
    f = jf.EnergyMLP(6, 12, 2, activation="gelu", spectral_norm=True).to(backend.device)
    decoders = [Decoder().to(backend.device) for _ in range(2)]
    decoders[1].load_state_dict(decoders[0].state_dict())
    target, z = normal(9, 5).to(backend.device), normal(9, 6, seed=102).to(backend.device)
    steps = [0.1 + 0.01 * k for k in range(n_steps)]
    prior = jf.FastLangevin(
        f if recognised else (lambda z: f(z)), n_steps=n_steps, step_size=steps, backend=backend.name
    )
    options = {"return_info": True, "return_trajectory": True, "thin": 2, "first_step": 4, "first_chain": 3}
    options |= {"noise_key": 2**63 + 7} if noise == "key" else {"noise": normal(n_steps, 9, 6).to(backend.device)}
    results = []
    for is_captured, decoder in zip((False, True), decoders, strict=True):
        f.eval()
        results.append(
            prior.sample(
                z,
                log_likelihood=lambda z, d=decoder: -((d(z) - target) ** 2).sum(),
                capture=is_captured,
                **options,
            )
        )
        assert capture.calls == ([] if not is_captured else ["first", "record", *["replay"] * (n_steps - 1)])
    (end, info), (captured_end, captured_info) = results
    torch.testing.assert_close(captured_end, end, rtol=0, atol=1e-6)
    for name in info._fields:
        torch.testing.assert_close(getattr(captured_info, name), getattr(info, name), rtol=1e-5, atol=1e-6)
    for a, b in zip(decoders[0].buffers(), decoders[1].buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_input_is_untouched_and_bad_steps_are_named(capture):
    z = normal(9, 6)
    before = z.clone()
    noise = normal(6, 9, 6)
    noise[3, 2, 1] = float("inf")
    prior = jf.FastLangevin(lambda z: -(z**4).sum(1), n_steps=6, step_size=0.1)
    end, info = prior.sample(z, noise=noise, return_info=True)
    assert torch.equal(z, before)
    assert end.data_ptr() != z.data_ptr()
    assert info.first_bad_step.tolist() == [-1, -1, 3] + [-1] * 6
    assert capture.calls[:2] == ["first", "record"]


def test_only_on_a_cuda_device_and_for_chains_worth_it():
    assert not can_capture(torch.zeros(3, 4), 60)
    assert not can_capture(torch.zeros(0, 4), 60)


class Cuda:
    """torch.cuda as far as a capture goes: its calls, and a step or an end that CUDA refuses."""

    def __init__(self, monkeypatch, refused):
        self.calls, self.pools = [], 0
        cuda = self

        class Graph:
            def capture_begin(self, pool, capture_error_mode):
                assert capture_error_mode == "thread_local"
                cuda.calls.append(f"begin in pool {pool}")

            def capture_end(self):
                cuda.calls.append("end")
                if refused:
                    raise RuntimeError("operation failed due to a previous error during capture")

            def replay(self):
                cuda.calls.append("replay")

        def pool():
            self.pools += 1
            return self.pools

        monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", pool)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch, "empty", lambda *shape, device: torch.zeros(*shape))
        ended = lambda index, pool: cuda.calls.append(f"allocator done with pool {pool}")  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", ended, raising=False)


def test_captures_follow_each_other_into_one_pool(monkeypatch):
    cuda = Cuda(monkeypatch, refused=False)
    capture = CudaCapture(torch.device("cuda", 0))
    for _ in range(2):
        capture.record(lambda: cuda.calls.append("step"))()
    assert cuda.calls == ["begin in pool 1", "step", "end", "replay"] * 2
    assert gc.isenabled()


def test_a_step_that_cannot_be_captured_names_the_remedy_and_leaves_torch_in_order(monkeypatch):
    cuda, before = Cuda(monkeypatch, refused=True), len(captured._BROKEN)
    capture = CudaCapture(torch.device("cuda", 0))
    with pytest.raises(RuntimeError, match=r"previous error.*pass capture=False"):
        capture.record(lambda: None)
    # the second capture, which succeeds where it is CUDA's, tells torch's generator that none is under way
    assert cuda.calls == ["begin in pool 1", "end", "allocator done with pool 1", "begin in pool 2", "end"]
    with pytest.raises(RuntimeError):
        capture.record(lambda: None)
    assert cuda.calls[5] == "begin in pool 3"
    assert len(captured._BROKEN) == before + 2
    assert gc.isenabled()


def test_a_mistake_in_the_step_is_told_as_it_is(monkeypatch):
    cuda = Cuda(monkeypatch, refused=False)

    def wrong():
        raise ValueError("log_likelihood must return")

    with pytest.raises(ValueError, match=r"^log_likelihood must return$"):
        CudaCapture(torch.device("cuda", 0)).record(wrong)
    assert cuda.calls == ["begin in pool 1", "end"]
    assert cuda.pools == 2


def test_a_graph_of_the_caller_draws_its_key_on_the_device(monkeypatch):
    """Drawn on the host, the key would be one number for all replays."""
    drawn = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(rng, "draw_key_in_graph", lambda generator, device: drawn.append(device) or "key")
    assert rng.noise_key_of(None, None, torch.device("cuda")) == "key"
    assert rng.noise_key_of(5, None, torch.device("cuda")) == 5
    assert isinstance(rng.noise_key_of(None, None, torch.device("cpu")), int)
    assert drawn == [torch.device("cuda")]


def test_a_chosen_logit_is_not_looked_at_while_a_graph_is_captured(monkeypatch):
    """A value that leaves the device breaks the capture; step 0 of a captured chain has looked at it."""
    f = jf.EnergyMLP(4, 5, 1, out_features=3, head="logit")
    z, y = normal(2, 4), torch.tensor([0, 3])
    with pytest.raises(ValueError, match=r"entries in \[0, 3\)"):
        f.mlp(z, y=y)
    monkeypatch.setattr(energy, "capturing", lambda device: True)
    assert torch.equal(f.mlp(z, y=y).logit, y)


def test_keys_drawn_on_a_device_have_64_bits():
    generator, cpu = torch.Generator().manual_seed(1), torch.device("cpu")
    keys = torch.cat([rng.draw_key_in_graph(generator, cpu) for _ in range(1000)])
    bits = torch.stack([(keys >> i) & 1 for i in range(64)]).float().mean(1)
    assert float((bits - 0.5).abs().max()) < 5 * 0.5 / 1000**0.5
    with pytest.raises(ValueError, match="while a CUDA graph is captured, got one on"):
        rng.draw_key_in_graph(generator, torch.device("cuda"))
    with pytest.raises(ValueError, match="got int"):
        rng.draw_key_in_graph(7, cpu)
