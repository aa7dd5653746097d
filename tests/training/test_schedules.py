"""Learning-rate schedules and the average of parameters, against their closed forms."""

import math

import pytest
import torch
from torch import nn

from jlebm_fast.errors import CheckpointError
from jlebm_fast.training.averaging import ParameterAverage, put_parameters
from jlebm_fast.training.schedules import rate_factor


def factors(schedule, **options):
    return [rate_factor(schedule, t, 10, 4, **options) for t in range(10)]


def test_the_published_schedule_falls_after_each_epoch():
    assert factors("epoch", decay=0.998) == [0.998 ** (t // 4) for t in range(10)]


def test_constant_and_cosine():
    assert factors("constant", decay=0.5) == [1.0] * 10
    cosine = factors("cosine")
    assert cosine[0] == 1.0
    assert cosine == sorted(cosine, reverse=True)
    assert cosine[5] == pytest.approx(0.5)
    assert rate_factor("cosine", 10, 10, 4) == pytest.approx(0.0)
    assert cosine[3] == pytest.approx(math.cos(math.pi * 3 / 20) ** 2)


def test_warm_up_rises_to_the_schedule():
    assert factors("constant", warmup_steps=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    warm, plain = factors("cosine", warmup_steps=3), factors("cosine")
    assert warm[3:] == plain[3:]
    assert warm[1] == pytest.approx(plain[1] * 2 / 3)


def test_an_unknown_schedule_is_named():
    with pytest.raises(ValueError, match="schedule must be one of epoch, constant, cosine, got 'linear'"):
        rate_factor("linear", 0, 1, 1)


def test_the_average_is_the_weighted_sum_of_the_past():
    """By the decay (1 + t) / (10 + t) of its beginning and then, from the fourth step on, its own."""
    model, decay = nn.Linear(3, 2), 0.35
    average = ParameterAverage(model, decay)
    expected = model.weight.detach().double().clone()
    for i in range(6):
        with torch.no_grad():
            model.weight.mul_(0.9).add_(i)
        average.update(model, i + 1)
        d = (2 / 11, 3 / 12, 4 / 13, decay, decay, decay)[i]
        expected = d * expected + (1 - d) * model.weight.detach().double()
    torch.testing.assert_close(average.values["weight"].double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(average.values["bias"], model.bias)
    other = nn.Linear(3, 2)
    put_parameters(dict(other.named_parameters()), average.values)
    assert torch.equal(other.weight, average.values["weight"])
    with pytest.raises(CheckpointError, match="belong to another model"):
        ParameterAverage(nn.Linear(3, 3), decay).load(average.values)
