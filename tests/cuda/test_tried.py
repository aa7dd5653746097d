"""Regimes that are not used unless asked for: by whom they are, and what is said where they cannot be."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from mlp_host import H100_SHARED

from jlebm_fast.backends import cuda_tried

NOTHING = ("a chip", 80, 132, H100_SHARED, False, False)
HOPPER, BLACKWELL = ("a chip", 90, 132, H100_SHARED, True, True), ("a chip", 100, 148, H100_SHARED, False, True)


@pytest.fixture
def asked(monkeypatch):
    """Sets the environment's word."""

    def ask(value):
        monkeypatch.delenv(cuda_tried.TRY, raising=False)
        if value is not None:
            monkeypatch.setenv(cuda_tried.TRY, value)
        cuda_tried._wanted_by_environment.cache_clear()

    yield ask
    cuda_tried._wanted_by_environment.cache_clear()


def test_nobody_gets_them_who_has_not_asked(asked):
    for value in (None, ""):
        asked(value)
        assert cuda_tried.tried(HOPPER) == cuda_tried.tried(NOTHING) == (False, False)
        with cuda_tried.trying("warpgroup"):
            assert cuda_tried.tried(HOPPER) == (True, False)
            with cuda_tried.trying("cluster"):
                assert cuda_tried.tried(HOPPER) == (False, True)
        assert cuda_tried.tried(HOPPER) == (False, False)


def test_the_environment_asks(asked):
    asked("warpgroup, cluster")
    assert cuda_tried.tried(HOPPER) == (True, True)
    with cuda_tried.trying():
        assert cuda_tried.tried(HOPPER) == (False, False)
    asked("cluster")
    assert cuda_tried.tried(BLACKWELL) == (False, True)


def test_who_asks_in_vain_is_told(asked, monkeypatch):
    monkeypatch.setattr(cuda_tried._native, "load", lambda: SimpleNamespace(cuda_archs="80-real"))
    asked("warpgroup")
    with pytest.raises(ValueError, match=r"'warpgroup' .* got a chip of 8\.0 and a build for 80-real"):
        cuda_tried.tried(NOTHING)
    asked("warpgroup,cluster")
    with pytest.raises(ValueError, match="'warpgroup'"):
        cuda_tried.tried(BLACKWELL)
    asked("cluster")
    with pytest.raises(ValueError, match=r"'cluster' .* 9\.0 \(H100, H200\) or 10 and a build"):
        cuda_tried.tried(NOTHING)
    asked("on")
    with pytest.raises(ValueError, match=r"JLEBM_CUDA_TRY: expected names of warpgroup, cluster, got 'on'"):
        cuda_tried.tried(HOPPER)
    with (
        pytest.raises(ValueError, match=r"trying: expected names of warpgroup, cluster, got 'clusters'"),
        cuda_tried.trying("clusters"),
    ):
        pass
