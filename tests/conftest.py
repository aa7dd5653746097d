"""Every test that takes `backend` runs on each backend of this machine: a new one is covered without a new test."""

from __future__ import annotations

from typing import NamedTuple

import pytest

import jlebm_fast as jf


class Backend(NamedTuple):
    name: str
    device: str


BACKENDS = [
    Backend(status.name, device.partition(":")[0])
    for status in jf.available_backends()
    for device in dict.fromkeys(d.partition(":")[0] for d in status.devices)
    if status.available
]


@pytest.fixture(params=BACKENDS, ids="-".join)
def backend(request) -> Backend:
    return request.param
