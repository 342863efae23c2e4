"""Regressions of the checker: what errors depend on."""

import numpy as np
import pytest

from sb3_mpg.common.models.checking.regression import explained_shares


@pytest.mark.parametrize(("n_rows", "n_inputs"), [(200, 4), (1024, 3), (1024, 13), (1024, 30)])
@pytest.mark.parametrize("share", [0.0, 0.4, 0.8])
def test_the_share_of_a_noisy_linear_function(n_rows, n_inputs, share):
    """However many inputs there are: a regression with more factors than needed finds less."""
    rng = np.random.default_rng(0)
    inputs, noise = rng.normal(size=(n_rows, n_inputs)), rng.normal(size=n_rows)
    signal = inputs @ rng.normal(size=n_inputs)
    targets = np.sqrt(share) * signal / signal.std() + np.sqrt(1 - share) * noise
    assert explained_shares(targets[:, None], inputs)[0] == pytest.approx(share, abs=0.1)


def test_functions_that_are_not_linear():
    rng = np.random.default_rng(0)
    inputs = rng.uniform(-1, 1, size=(1024, 3))
    targets = np.stack([inputs[:, 0] * inputs[:, 1], np.cos(4 * inputs[:, 2]), np.full(1024, 3.0)], axis=1)
    assert (explained_shares(targets, inputs) > 0.95).all()


def test_too_few_rows_tell_nothing():
    assert np.isnan(explained_shares(np.zeros((20, 2)), np.random.default_rng(0).normal(size=(20, 5)))).all()
