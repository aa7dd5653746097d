"""The examples in the docstrings of models, training and experiments run as written."""

import doctest
import importlib
import pkgutil

import pytest

from jlebm_fast import experiments, models, training

MODULES = [
    f"{package.__name__}.{module.name}"
    for package in (experiments, models, training)
    for module in pkgutil.iter_modules(package.__path__)
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module, extraglobs={"torch": importlib.import_module("torch")}).failed == 0
