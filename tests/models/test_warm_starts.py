"""Warm starts: what was put is got back, for those images and no others."""

import pytest
import torch

from jlebm_fast.models.warm_starts import WarmStarts


def test_first_starts_are_standard_normal():
    z = torch.cat(WarmStarts(4000, (2, 3), noise_key=5).get(torch.arange(4000)), dim=1)
    # five standard errors of a mean and of a variance over 20,000 normals
    assert abs(float(z.mean())) < 5 / 20_000**0.5
    assert abs(float(z.var()) - 1) < 5 * (2 / 20_000) ** 0.5


def test_put_and_get_concern_the_named_images_only():
    starts, rows = WarmStarts(10, (2, 3)), torch.tensor([7, 2])
    before = starts.z.clone()
    zs = [torch.randn(2, 2, requires_grad=True), torch.randn(2, 3)]
    starts.put(rows, zs)
    got = starts.get(rows)
    assert all(torch.equal(a, b) for a, b in zip(got, zs, strict=True))
    assert not starts.z.requires_grad
    others = torch.tensor([i for i in range(10) if i not in (7, 2)])
    assert torch.equal(starts.z[others], before[others])
    got[0].zero_()
    assert torch.equal(starts.get(rows)[0], zs[0])  # a copy was given


def test_a_checkpoint_holds_them():
    starts, again = WarmStarts(10, (2,), noise_key=1), WarmStarts(10, (2,), noise_key=2)
    assert not torch.equal(starts.z, again.z)
    again.load_state_dict(starts.state_dict())
    assert torch.equal(starts.z, again.z)


def test_what_does_not_fit_is_named():
    starts = WarmStarts(10, (2, 3))
    with pytest.raises(ValueError, match="n_images must be a positive number"):
        WarmStarts(0, (2,))
    with pytest.raises(ValueError, match=r"zs must be \[\[1, 2\], \[1, 3\]\], got \[\[1, 5\]\]"):
        starts.put(torch.tensor([1]), [torch.zeros(1, 5)])
    with pytest.raises(ValueError, match=r"rows must be int64 \[n\]"):
        starts.get(torch.tensor([1.0]))
