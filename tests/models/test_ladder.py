"""Geometry, generator and encoder: shapes for every kind of image, and who depends on whom."""

import pytest
import torch

from jlebm_fast.models import Ladder, LadderEncoder, LadderGenerator

CASES = [
    ((3,), 8, 1, "add"),
    ((2, 2, 2, 10), 32, 3, "add"),
    ((4, 6, 10), 32, 1, "concat"),
    ((2, 2, 2, 2, 2, 2), 16, 1, "add"),
    ((5, 5), 64, 3, "concat"),
]


def ladder_of(dims, size, channels):
    return Ladder(dims, image_size=size, image_channels=channels, width=4)


def test_levels_of_the_published_sizes():
    assert Ladder((4, 6, 10), 32, 1, 32).levels == (2, 1, 0)
    assert Ladder((2, 2, 2, 10), 32, 3, 32).levels == (2, 1, 0, 0)
    assert Ladder((7,), 64, 3, 32).levels == (0,)
    ladder = Ladder((4, 6, 10), 32, 1, 32)
    assert [ladder.channels(level) for level in range(3)] == [128, 64, 32]
    assert [ladder.pixels(level) for level in range(3)] == [4, 8, 16]


@pytest.mark.parametrize(
    ("dims", "size", "width"), [((), 16, 4), ((0,), 16, 4), ((2,), 12, 4), ((2,), 4, 4), ((2,), 16, 0)]
)
def test_impossible_geometry_is_refused(dims, size, width):
    with pytest.raises(ValueError, match=r"latent_dims|image_size|width"):
        Ladder(dims, size, 1, width)


@pytest.mark.parametrize(("dims", "size", "channels", "combine"), CASES)
def test_images_and_posteriors_have_their_shapes(dims, size, channels, combine):
    ladder = ladder_of(dims, size, channels)
    generator, encoder = LadderGenerator(ladder, combine), LadderEncoder(ladder)
    images = generator([torch.randn(3, d) for d in dims])
    assert images.shape == (3, channels, size, size)
    assert images.abs().max() < 1
    posterior = encoder(images)
    assert [tuple(m.shape) for m in posterior.mean] == [(3, d) for d in dims]
    assert [tuple(v.shape) for v in posterior.log_variance] == [(3, d) for d in dims]


@pytest.mark.parametrize(("dims", "size", "channels", "combine"), CASES)
def test_every_layer_reaches_the_image(dims, size, channels, combine):
    torch.manual_seed(0)
    generator = LadderGenerator(ladder_of(dims, size, channels), combine)
    zs = [torch.randn(2, d, requires_grad=True) for d in dims]
    for gradient in torch.autograd.grad(generator(zs).square().sum(), zs):
        assert (gradient != 0).all()


def test_the_ladder_goes_up():
    torch.manual_seed(0)
    encoder = LadderEncoder(ladder_of((2, 3, 4), 16, 1))
    images = torch.rand(2, 1, 16, 16)
    before = encoder(images)
    with torch.no_grad():
        for parameter in encoder.stages[1].parameters():
            parameter.add_(0.1)
    after = encoder(images)
    assert torch.equal(before.mean[0], after.mean[0])  # the layer below does not see the change
    assert not torch.equal(before.mean[1], after.mean[1])
    assert not torch.equal(before.mean[2], after.mean[2])


def test_kl_is_the_closed_form_of_torch():
    torch.manual_seed(0)
    posterior = LadderEncoder(ladder_of((2, 3), 16, 1))(torch.rand(4, 1, 16, 16))
    expected = 0
    for mean, log_variance in zip(posterior.mean, posterior.log_variance, strict=True):
        q = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
        expected = expected + torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(posterior.kl_to_standard_normal(), expected)


def test_posterior_samples_have_the_posterior_law():
    posterior = LadderEncoder(ladder_of((1, 2), 16, 1))(torch.rand(1, 1, 16, 16))
    many = type(posterior)(
        [m.expand(20_000, -1) for m in posterior.mean], [v.expand(20_000, -1) for v in posterior.log_variance]
    )
    generator = torch.Generator().manual_seed(1)
    zs = many.sample([torch.randn(mean.shape, generator=generator) for mean in many.mean])
    for z, mean, log_variance in zip(zs, posterior.mean, posterior.log_variance, strict=True):
        std = (0.5 * log_variance[0]).exp()
        # five standard errors of mean and of standard deviation
        assert ((z.mean(0) - mean[0]).abs() < 5 * std / 20_000**0.5).all()
        assert ((z.std(0) - std).abs() < 5 * std / (2 * 20_000) ** 0.5).all()


def test_wrong_input_is_named():
    ladder = ladder_of((2, 3), 16, 1)
    with pytest.raises(ValueError, match=r"d = \[2, 3\], bottom to top"):
        LadderGenerator(ladder)([torch.zeros(1, 3), torch.zeros(1, 2)])
    with pytest.raises(ValueError, match=r"images must be \[n, 1, 16, 16\], got \[1, 3, 16, 16\]"):
        LadderEncoder(ladder)(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="combine"):
        LadderGenerator(ladder, "multiply")
