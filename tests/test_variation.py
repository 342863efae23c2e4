"""How much of the variation of returns their derivatives explain."""

import numpy as np
import pytest

from sb3_mpg.common.trust.variation import BLIND, PERTURBATION, SHARE_IGNORED, Perturbed, measure_variation

N_STATES = 2000


def variation_of(function, derivative, points=None):
    """The variation of a function of one action, at random points or at those given."""
    points = np.random.default_rng(0).uniform(-1, 1, N_STATES) if points is None else points
    returns = function(points)
    up, down = function(points + PERTURBATION) - returns, function(points - PERTURBATION) - returns
    arrays = returns, up, down, PERTURBATION * derivative(points)
    variation = measure_variation(Perturbed(*(values[np.newaxis] for values in arrays)))
    return variation.explained.item(), variation.is_silent.item(), variation.varies.item()


def jump(points):
    return (points > 0).astype(float)


@pytest.mark.parametrize("curvature", [0.0, 1.0, -30.0])
def test_a_smooth_return_is_explained_whatever_its_curvature(curvature):
    def quadratic(points):
        return 2 * points + curvature * points**2

    def derivative(points):
        return 2 + 2 * curvature * points

    explained, is_silent, varies = variation_of(quadratic, derivative)
    assert explained == pytest.approx(1.0, abs=1e-9) and not is_silent and varies


def test_a_derivative_that_is_too_large_everywhere_is_not_blind():
    """Its size is a matter of the errors; what counts here is that it points to where returns are larger."""
    assert variation_of(np.sin, lambda points: 5 * np.cos(points))[0] == pytest.approx(1.0, abs=1e-3)
    assert variation_of(np.sin, lambda points: -np.cos(points))[0] == 0.0


def test_at_an_optimum_the_derivative_is_believed():
    """There the changes are even, and the derivative is next to nothing."""
    points = 0.01 * PERTURBATION * np.random.default_rng(0).standard_normal(N_STATES)
    assert variation_of(lambda a: -(a**2), lambda a: 0.5 * a, points) == (1.0, False, True)


def test_a_derivative_of_zero_explains_no_jump():
    assert variation_of(jump, np.zeros_like) == (0.0, True, True)
    # Nor does it where nothing changes
    assert variation_of(np.zeros_like, np.zeros_like) == (0.0, True, False)


@pytest.mark.parametrize("height", [0.05, 0.5])
def test_of_stairs_on_a_slope_only_the_slope_is_explained(height):
    slope, width = 2.0, 0.3

    def stairs(points):
        return slope * points + height * np.floor(points / width)

    explained, is_silent, varies = variation_of(stairs, lambda points: np.full_like(points, slope))
    # D is the slope's part, and half of the height more with the probability that a step lies between the two sides
    part, probability = slope * PERTURBATION, 2 * PERTURBATION / width
    probability = (probability - SHARE_IGNORED) / (1 - SHARE_IGNORED)  # the largest changes are not counted
    mean, square = part + probability * height / 2, (1 - probability) * part**2 + probability * (part + height / 2) ** 2
    assert explained == pytest.approx(mean**2 / square, rel=0.1)
    assert not is_silent and varies


def test_a_slope_is_blind_to_high_stairs_in_both_directions():
    """Where the slope leads up a step as often as down one, it is of no use."""
    explained, is_silent, _ = variation_of(
        lambda points: 0.1 * points + np.sign(np.sin(20 * points)), lambda points: np.full_like(points, 0.1)
    )
    assert explained < BLIND and not is_silent


def test_a_derivative_is_silent_when_it_is_zero_at_most_states():
    def of_share(share):
        return variation_of(lambda points: np.maximum(points - 1 + 2 * share, 0), lambda points: points > 1 - 2 * share)[1]

    assert of_share(0.4) and not of_share(0.6)


def test_changes_below_rounding_errors_say_nothing():
    rng = np.random.default_rng(0)
    noise, returns = 1e-7 * rng.standard_normal((3, 1, N_STATES)), np.full((1, N_STATES), 1.0)
    variation = measure_variation(Perturbed(returns, *noise))
    assert variation.explained.tolist() == [1.0] and variation.varies.tolist() == [False]
    # The same of smaller returns are no rounding errors
    variation = measure_variation(Perturbed(1e-3 * returns, *noise))
    assert variation.explained[0] < BLIND and variation.varies.tolist() == [True]


def example():
    """Returns that are exactly linear."""
    linear = np.random.default_rng(0).standard_normal((1, N_STATES))
    return [np.ones((1, N_STATES)), linear.copy(), -linear, linear.copy()]


@pytest.mark.parametrize("name", Perturbed._fields)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_do_not_count_unless_they_are_the_most(name, value):
    arrays = example()
    arrays[Perturbed._fields.index(name)][0, : N_STATES // 2] = value
    assert measure_variation(Perturbed(*arrays)).explained.tolist() == pytest.approx([1.0])
    arrays[Perturbed._fields.index(name)][0, N_STATES // 2] = value
    assert measure_variation(Perturbed(*arrays)).explained.tolist() == [0.0]


def test_nothing_that_is_finite_is_not_silent():
    arrays = [np.full((1, 8), np.nan)] * 4
    variation = measure_variation(Perturbed(*arrays))
    assert variation.explained.tolist() == [0.0] and variation.is_silent.tolist() == [False]


@pytest.mark.parametrize("index", [1, 3])
def test_a_few_rollouts_that_diverge_decide_nothing(index):
    arrays = example()
    arrays[index][0, ::100] = 1e6
    assert measure_variation(Perturbed(*arrays)).explained.tolist() == pytest.approx([1.0])
    arrays[index][0, ::10] = 1e6
    assert measure_variation(Perturbed(*arrays)).explained[0] < 0.5


def test_horizons_and_members():
    """Rows of all members count together, and horizons apart."""
    linear = np.random.default_rng(0).standard_normal((2, 3, 500))
    up = linear.copy()
    up[1] = np.random.default_rng(1).standard_normal((3, 500))
    variation = measure_variation(Perturbed(np.ones_like(up), up, -up, linear))
    assert variation.explained[0] == pytest.approx(1.0) and variation.explained[1] < 0.05
