"""Scales that are taken from data."""

import torch as th

from sb3_mpg.common.models.scaling import Standardizer


def test_it_does_nothing_until_it_is_fitted():
    inputs = th.randn(5, 3)
    assert th.equal(Standardizer(3)(inputs), inputs)


def test_inputs_have_mean_zero_and_unit_variance():
    standardizer, inputs = Standardizer(2), th.tensor([100.0, 1e-4]) * th.randn(500, 2) + th.tensor([-300.0, 5e-4])
    standardizer.fit(inputs)
    outputs = standardizer(inputs)
    th.testing.assert_close(outputs.mean(dim=0), th.zeros(2), rtol=0, atol=1e-5)
    th.testing.assert_close(outputs.std(dim=0), th.ones(2))


def test_what_never_changed_keeps_its_scale():
    standardizer = Standardizer(2)
    standardizer.fit(th.cat([th.full((50, 1), 7.0), th.randn(50, 1)], dim=1))
    assert standardizer.std[0] == 1 and standardizer(th.tensor([[7.5, 0.0]]))[0, 0] == 0.5
    # Nor does a single row say anything
    standardizer.fit(th.tensor([[3.0, 4.0]]))
    assert standardizer.std.tolist() == [1, 1] and standardizer.mean.tolist() == [3, 4]
