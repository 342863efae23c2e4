"""Comparisons that several tests make."""

import torch as th


def assert_same_parameters(first, second):
    """The policies of two algorithms are equal to the last bit."""
    for (key, expected), value in zip(first.policy.state_dict().items(), second.policy.state_dict().values(), strict=True):
        assert th.equal(expected, value), key
