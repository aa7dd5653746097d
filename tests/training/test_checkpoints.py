"""Checkpoints: exact, atomic, and harmless whoever wrote them."""

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from jlebm_fast.errors import CheckpointError
from jlebm_fast.training.checkpoints import load_checkpoint, save_checkpoint


def example_state():
    return {
        "step": 7,
        "sums": {"loss": 0.1 + 0.2},
        "optimiser": {"state": {0: {"step": torch.tensor(3.0)}}, "groups": [{"betas": (0.0, 0.9), "fused": None}]},
        "random": torch.get_rng_state(),
        "weights": [torch.randn(3, 4).t(), torch.tensor(5), torch.zeros(0)],
        "flag": True,
        "name": "joint",
    }


def assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for u, v in zip(a, b, strict=True):
            assert_same(u, v)
    else:
        assert a == b
        assert type(a) is type(b)


def test_everything_comes_back_exactly(tmp_path):
    state = example_state()
    save_checkpoint(tmp_path / "c", state)
    assert_same(state, load_checkpoint(tmp_path / "c"))


def test_other_types_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match=r"set at \.bad"):
        save_checkpoint(tmp_path / "c", {"bad": {1, 2}})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["replace", "fsync"])
def test_a_death_while_writing_keeps_the_old_file(tmp_path, monkeypatch, moment):
    save_checkpoint(tmp_path / "c", {"step": 1})

    def die(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, moment, die)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path / "c", {"step": 2})
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "c") == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_malicious_pickle_runs_nothing(tmp_path):
    class Exploit:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    (tmp_path / "c").write_bytes(pickle.dumps(Exploit()))
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / "c")
    torch.save({"model": Exploit()}, tmp_path / "c")
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / "c")
    assert not (tmp_path / "owned").exists()


def test_damage_is_one_sentence(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "c")
    save_checkpoint(tmp_path / "c", example_state())
    whole = (tmp_path / "c").read_bytes()
    for damaged in (b"", whole[:5], whole[: len(whole) // 2], b"\xff" * 100):
        (tmp_path / "c").write_bytes(damaged)
        with pytest.raises(CheckpointError, match="not a readable checkpoint") as caught:
            load_checkpoint(tmp_path / "c")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["[]", "3", "null", '{"items": 3}', '{"no": 1}', '{"items": [[1]]}', "{", '{"items": [[[], 1]]}']
)
def test_foreign_safetensors_are_refused(tmp_path, text):
    save_file({"w": torch.ones(2)}, tmp_path / "c", metadata={"state": text})
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "c")
    save_file({"w": torch.ones(2)}, tmp_path / "c")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "c")
