"""The Fréchet distance against closed forms, and the evaluation of a run."""

import pytest
import scipy.linalg
import torch

from jlebm_fast.training.frechet import frechet_distance


def test_distance_of_a_set_to_itself_is_zero():
    a = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_shift_and_scale_have_closed_forms():
    a = torch.randn(500, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert frechet_distance(a, a + torch.tensor([1.0, 2.0, 2.0])) == pytest.approx(9.0)
    spread = torch.cov(a.T).trace().item()
    assert frechet_distance(a, 3 * a) == pytest.approx(4 * spread + 4 * a.mean(0).square().sum().item())


def test_distance_agrees_with_the_matrix_square_root():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(300, 6, generator=generator).double() @ torch.randn(6, 6, generator=generator).double()
    b = torch.randn(400, 6, generator=generator).double() @ torch.randn(6, 6, generator=generator).double() + 1
    covariances = torch.cov(a.T).numpy(), torch.cov(b.T).numpy()
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = (a.mean(0) - b.mean(0)).square().sum().item() + (covariances[0] + covariances[1] - 2 * root).trace()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_flat_directions_do_not_break_it():
    a = torch.zeros(10, 4)
    a[:, 0] = torch.arange(10.0)
    assert frechet_distance(a, a + 1) == pytest.approx(4.0)


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match="n, m >= 2"):
        frechet_distance(torch.zeros(1, 3), torch.zeros(5, 3))
