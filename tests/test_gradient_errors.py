"""Estimates of the errors of the action gradients."""

import warnings

import numpy as np
import pytest
import torch as th
from helpers import rollout_context
from lq import LinearActor, LinearModel, analytic_gradient, quadratic_q, random_problem, tensors
from models import Known, batch_of, truth

from sb3_mpg.common.models.residual import ResidualModel
from sb3_mpg.common.trust.gradient_errors import (
    ActionGradients,
    GradientErrors,
    action_gradients,
    gradient_errors,
    measure_gradient_errors,
    trust_in_returns,
    warn_of_errors,
)
from sb3_mpg.common.trust.variation import Perturbed, Variation


def test_action_gradients_are_the_analytic_ones():
    a, b, q, r, k, _ = random_problem()
    rng = np.random.default_rng(1)
    critics = [tuple(rng.normal(size=shape) for shape in ((3, 3), (3, 2), (2, 2))) for _ in range(2)]
    critics = [(p_ss + p_ss.T, p_sa, p_aa + p_aa.T) for p_ss, p_sa, p_aa in critics]
    states = rng.normal(size=(4, 3))
    context = rollout_context(LinearActor(th.as_tensor(k)), LinearModel(*tensors(a, b, q, r)), gamma=0.95)
    q_functions = [quadratic_q(*tensors(*critic)) for critic in critics]
    gradients, perturbed = action_gradients(th.as_tensor(states), context, q_functions, (0, 1, 7))
    assert gradients.shape == (3, 2, 4, 2) and all(values.shape == (3, 2, 4) for values in perturbed)
    for index, horizon in enumerate((0, 1, 7)):
        for member, critic in enumerate(critics):
            for row, state in enumerate(states):
                # dJ/dK = dX/da s', so that dX/da follows from it
                expected = analytic_gradient(state, a, b, q, r, k, critic, horizon, 0.95) @ state / (state @ state)
                np.testing.assert_allclose(gradients[index, member, row], expected, rtol=1e-9, atol=1e-9)
    # Returns are quadratic here, so that their odd changes are exactly linear, and their even changes are the curvature
    np.testing.assert_allclose((perturbed.up - perturbed.down) / 2, perturbed.linear, rtol=1e-9, atol=1e-12)
    assert (np.abs(perturbed.up + perturbed.down) > 1e-6).all() and (perturbed.linear != 0).all()


def synthetic(critic_std=0.0, critic_bias=0.0, model_std=0.0, n_states=4000, seed=0):
    """Two estimates of a gradient (2, -1) each: of critics with a common bias and own noise, and of models with noise."""
    rng = np.random.default_rng(seed)
    gradients = np.tile(np.array([2.0, -1.0]), (2, 2, n_states, 1))
    gradients[0] += critic_std * rng.standard_normal((2, n_states, 2)) + critic_bias * rng.standard_normal((1, n_states, 2))
    gradients[1] += model_std * rng.standard_normal((2, n_states, 2))
    return gradients


def test_independent_errors():
    """With N(0, std) noise in two dimensions, the median of |d|^2 / 2 is std^2 times that of chi^2_2, which is 2 ln 2."""
    measured = gradient_errors(synthetic(critic_std=0.5, model_std=0.1), (0, 25))
    np.testing.assert_allclose(measured.errors, 2 * np.log(2) * np.array([0.25, 0.01]), rtol=0.1)
    assert abs(measured.errors[1] - 2 * np.log(2) * 0.01) < 4 * measured.standard_errors[1]
    assert (measured.standard_errors < 0.1 * measured.errors).all()
    assert measured.gradient_norm == pytest.approx(5.0, rel=0.05)


def test_the_common_error_of_the_critics_is_seen_by_the_model():
    measured = gradient_errors(synthetic(critic_bias=0.5, critic_std=0.01, model_std=0.05), (0, 25))
    assert measured.errors[0] == pytest.approx(2 * np.log(2) * 0.25, rel=0.15)
    assert measured.errors[0] > 20 * measured.errors[1]


def three_horizons(model_std):
    """The critics' common bias counts half as much behind a few model steps, and not behind many; models have noise."""
    rng = np.random.default_rng(0)
    gradients = np.tile(np.array([2.0, -1.0]), (3, 2, 4000, 1))
    bias = rng.standard_normal((1, 4000, 2))
    gradients[0] += bias
    gradients[1] += 0.5 * bias + 0.02 * rng.standard_normal((2, 4000, 2))
    gradients[2] += model_std * rng.standard_normal((2, 4000, 2))
    return gradients


def test_what_short_horizons_have_of_the_critics_is_seen_by_longer_ones():
    measured = gradient_errors(three_horizons(model_std=0.05), (0, 5, 25))
    np.testing.assert_allclose(measured.errors, 2 * np.log(2) * np.array([1.0, 0.25, 0.05**2]), rtol=0.15)
    # The gradient of the longest horizon is the best
    assert measured.gradient_norm == pytest.approx(5.0, rel=0.05)


def test_longer_horizons_say_nothing_where_their_own_error_is_larger():
    measured = gradient_errors(three_horizons(model_std=10.0), (0, 5, 25))
    assert measured.errors[2] == pytest.approx(2 * np.log(2) * 100, rel=0.1)
    assert measured.errors[1] == pytest.approx(2 * np.log(2) * 0.02**2, rel=0.1)
    # Half of the critics' bias is what is different at horizon 5
    assert measured.errors[0] == pytest.approx(2 * np.log(2) * 0.25, rel=0.15)


def test_a_judge_sees_the_whole_error_of_what_it_judges():
    gradients = synthetic(critic_bias=0.3, critic_std=0.01, model_std=0.01)
    gradients[1, 0] += np.array([0.6, 0.8])
    measured = gradient_errors(gradients, (0, 25), with_judge=True)
    assert measured.errors[1] == pytest.approx(1.0, rel=0.05)
    assert measured.errors[0] == pytest.approx(2 * np.log(2) * 0.09, rel=0.15)


def test_a_judged_model_is_useless_when_its_gradient_is_nearly_the_opposite():
    def is_useless(offset, with_judge=True):
        gradients = synthetic(critic_std=0.05, model_std=0.05)
        gradients[1, 0] += np.array(offset)
        return gradient_errors(gradients, (0, 25), with_judge=with_judge).is_useless.tolist()

    assert is_useless((-4.0, 2.0)) == [False, True]
    assert is_useless((-3.0, 1.5)) == [False, False]
    # Without a judge no member is better than the others
    assert is_useless((-4.0, 2.0), with_judge=False) == [False, False]
    # At an optimum the gradient vanishes, and only the errors of prior model and judge are left
    gradients = synthetic(critic_std=0.5, model_std=0.1) - np.array([2.0, -1.0])
    assert gradient_errors(gradients, (0, 25), with_judge=True).is_useless.tolist() == [False, False]


def test_a_judged_model_is_useless_when_its_gradient_nearly_vanishes():
    gradients = synthetic(critic_std=0.05, model_std=0.05)
    gradients[1, 0] *= 0.2
    assert gradient_errors(gradients, (0, 25), with_judge=True).is_useless.tolist() == [False, False]
    gradients[1, 0] *= 0.4
    assert gradient_errors(gradients, (0, 25), with_judge=True).is_useless.tolist() == [False, True]
    assert gradient_errors(gradients, (0, 25)).is_useless.tolist() == [False, False]


def test_a_few_rollouts_that_explode_decide_nothing():
    gradients = synthetic(critic_std=0.5, model_std=0.1)
    expected = gradient_errors(gradients, (0, 25)).errors
    gradients[1, 0, ::7] = 1e20
    gradients[1, 1, 3::50] = np.nan
    np.testing.assert_allclose(gradient_errors(gradients, (0, 25)).errors, expected, rtol=0.5)
    gradients[1] = np.inf
    assert gradient_errors(gradients, (0, 25)).errors[1] == np.inf


def errors_of(errors=(1.0, 1.0), is_useless=(False, False), trust_in_ends=1.0, is_blind=False):
    errors, is_useless = np.array(errors), np.array(is_useless)
    variation = Variation(*(np.array([value] * 2) for value in (0.0 if is_blind else 1.0, False, True)))
    return GradientErrors(
        (0, 5), errors, 0.1 * errors, 1.0, is_useless, variation, trust_in_returns=0.5, trust_in_ends=trust_in_ends
    )


def test_horizons_of_a_model_are_excluded_and_horizon_0_is_not():
    assert errors_of().is_excluded.tolist() == [False, False]
    assert errors_of(is_useless=(False, True)).is_excluded.tolist() == [False, True]
    assert errors_of(trust_in_ends=0.0).is_excluded.tolist() == [False, True]
    blind = errors_of(is_blind=True)
    assert blind.is_excluded.tolist() == blind.is_blind.tolist() == [False, True] and blind.misses_jumps
    assert not errors_of().misses_jumps
    # Where actions have no effect there is nothing to miss
    still = blind._replace(variation=blind.variation._replace(varies=np.array([True, False])))
    assert still.is_blind.tolist() == [False, True] and not still.misses_jumps
    # What overflows is not blind, and nothing is known without a measurement of the variation
    assert not errors_of(errors=(1.0, np.inf), is_blind=True).is_blind.any()
    assert not blind._replace(variation=None).is_blind.any()
    # Without horizons of a model there is nothing that could be blind
    assert not blind._replace(horizons=(0,), errors=np.ones(1), variation=Variation(*np.zeros((3, 1)))).misses_jumps


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (errors_of(is_useless=(False, True)), "Mine is excluded"),
        (errors_of(trust_in_ends=0.0), "`Mine.terminal` does not know where episodes terminate"),
        (errors_of(errors=(1.0, np.inf)), "gradient of Mine over 5 steps is not finite"),
    ],
)
def test_what_is_wrong_is_said_the_first_time(wrong, message):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for earlier in ([], [errors_of()], [wrong], [wrong, errors_of()]):
            warn_of_errors(wrong, "Mine", earlier)
            warn_of_errors(errors_of(), "Mine", earlier)
    assert len(caught) == 2 and all(message in str(warning.message) for warning in caught)


def test_a_blind_model_is_reported_once_when_it_stays_blind():
    blind = errors_of(is_blind=True)
    # Horizon 10 sees what horizon 5 does not
    half = blind._replace(
        horizons=(5, 10), variation=Variation(np.array([0.0, 1.0]), np.zeros(2, dtype=bool), np.ones(2, dtype=bool))
    )
    assert half.is_blind.tolist() == [True, False] and not half.misses_jumps
    sequence = [blind, errors_of(), half, half, half, blind, blind, errors_of(), blind, blind, blind]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        n_caught = []
        for index, measured in enumerate(sequence):
            warn_of_errors(measured, "Mine", sequence[:index])
            n_caught.append(len(caught))
    assert n_caught == [0] * 6 + [1] * 5
    message = str(caught[0].message)
    assert (
        message.startswith("The derivative of the returns of Mine does not show") and "rewards or terminations jump" in message
    )
    assert "the critics learn from rollouts" in message and "Smooth the reward" in message


def test_a_useless_model_that_is_blind_too_is_called_useless():
    blind = errors_of(is_blind=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        useless = errors_of(is_useless=(False, True), is_blind=True)
        warn_of_errors(useless, "Mine", [blind, blind])
        warn_of_errors(blind, "Mine", [useless, blind])
    assert len(caught) == 1 and "Mine is excluded" in str(caught[0].message)


def test_trust_in_returns_is_the_share_of_the_variance_that_members_agree_on():
    rng = np.random.default_rng(0)
    common = 3.0 * rng.standard_normal(20_000)
    own = rng.standard_normal((2, 20_000))
    assert trust_in_returns(np.stack([common, common])) == 1.0
    # Half of the squared difference is 1, and the variance of the mean is 9 + 1/2
    assert trust_in_returns(common + own) == pytest.approx(1 - 1 / 9.5, rel=0.02)
    # The first and the last member have critics of their own; members between them do not matter
    assert trust_in_returns(np.stack([common, 10 * own[0], common])) == 1.0
    # Members that only have noise, or the opposite, in common
    assert trust_in_returns(own) == trust_in_returns(np.stack([common, -common])) == 0.0
    # Returns that are the same everywhere tell no action from another
    assert trust_in_returns(np.full((2, 8), 5.0)) == 0.0


def test_trust_in_returns_needs_finite_ones_at_most_states():
    returns = np.tile(np.arange(10.0), (2, 1))
    returns[0, :3], returns[1, 3:5] = np.nan, np.inf
    assert trust_in_returns(returns) == 1.0
    returns[1, 5] = -np.inf
    assert trust_in_returns(returns) == 0.0


def test_a_corrected_model_judges_only_if_it_predicts_better():
    model = ResidualModel(Known(), 2, 2)
    opposite = synthetic(critic_std=0.05, model_std=0.05)
    opposite[1, 0] *= -1
    ones = np.ones(opposite.shape[:3])
    opposite = ActionGradients(opposite, Perturbed(ones, ones, -ones, ones))

    def is_useless(held_out, judges_prior=True):
        measured = measure_gradient_errors(lambda: opposite, model, (0, 25), judges_prior, lambda: held_out)
        return measured.is_useless.tolist()

    # It has learned nothing so far
    assert is_useless(truth(200, seed=1)) == [False, False]
    model.rescale(truth(1000))
    for step in range(20):
        model.fit(batch_of(truth(1000), 256, step))
    assert is_useless(truth(200, seed=1)) == [False, True]
    # Nor can it be told without held-out steps, and a corrected model is not judged
    assert is_useless(None) == [False, False]
    assert is_useless(truth(200, seed=1), judges_prior=False) == [False, False]


def test_only_the_model_that_rollouts_use_must_explain_its_returns():
    """A judge that is blind does not matter, but the prior model that it judges does."""
    model = ResidualModel(Known(), 2, 2)
    rng = np.random.default_rng(0)
    linear = rng.standard_normal((2, 2, 100))
    blind = rng.standard_normal((2, 100))

    def measured(member, judges_prior=True):
        up = linear.copy()
        up[:, member] = blind
        compared = ActionGradients(synthetic(n_states=100), Perturbed(np.zeros_like(up), up, -up, linear))
        return measure_gradient_errors(lambda: compared, model, (0, 25), judges_prior, lambda: None)

    assert measured(0).is_blind.tolist() == [False, True]
    assert measured(1).variation.explained.tolist() == pytest.approx([1.0, 1.0])
    # Both members of a corrected model are used
    assert measured(1, judges_prior=False).variation.explained[1] < 0.6
