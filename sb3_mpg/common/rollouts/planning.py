"""Planning: a random search for a sequence of actions that is better than the policy's, in the model."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch as th

from sb3_mpg.common.rollouts.model_rollout import start_rollout
from sb3_mpg.common.rollouts.steps import PlannedState, QFunction, RolloutContext, expected
from sb3_mpg.common.utils import parameters_of_modules

# Standard deviations of the offsets are drawn between these, in [-1, 1] units: from refinements to full swings
SMALLEST_NOISE, LARGEST_NOISE = 0.2, 2.0
# The mean of the elites is taken unless it loses more than this share of the advantage of the best
TOLERANCE = 0.05
# A quarter of the children of a candidate are the candidate with this share of new offsets added
SHARE_ADDED = 0.3
# What offsets cost whose mean square is 1, and changes between steps whose mean square is 1, in standard deviations of the
# returns of random sequences. Of two plans that promise the same, the smaller and smoother one is better: a policy can learn
# it, while the noise of a search is beyond it
PRICE_OF_OFFSETS = 0.1
PRICE_OF_CHANGES = 0.3


def price(offsets: np.ndarray) -> np.ndarray:
    """
    :param offsets: sequences of offsets, ``(C, H, A)``
    :return: what they cost, in standard deviations of the returns of random sequences, ``(C,)``
    """
    changes = np.diff(offsets, axis=1, append=offsets[:, -1:])
    return PRICE_OF_OFFSETS * (offsets**2).mean(axis=(1, 2)) + PRICE_OF_CHANGES * (changes**2).mean(axis=(1, 2))


class Plan(NamedTuple):
    """
    A sequence of actions, as offsets to those of the policy.

    :param offsets: added to the policy's actions in the states that are reached, in [-1, 1] units, ``(H, A)``
    :param advantages: how much more each member of the model promises than for the policy, ``(E,)``
    :param spread: standard deviation of the returns of the first candidates
    """

    offsets: np.ndarray
    advantages: np.ndarray
    spread: float


class Planner(NamedTuple):
    """
    An evolutionary search. Derivatives are of no use where nothing that the policy does changes its return, as before a goal
    that it never reached; a search finds what lies beyond. Offsets are held for random times, because a system that is
    sampled fast answers only to actions that last.

    :param horizon: number of model steps :math:`H`
    :param n_candidates: number of sequences that are compared in each round
    :param n_elites: number of best sequences that the next round varies
    :param n_rounds: number of rounds
    """

    horizon: int
    n_candidates: int = 64
    n_elites: int = 8
    n_rounds: int = 4

    def random_offsets(self, n_sequences: int, n_actions: int) -> np.ndarray:
        """
        :param n_sequences: number of sequences :math:`C`
        :param n_actions: number of dimensions of an action
        :return: Gaussian offsets, held for times and scaled by factors that are drawn for each sequence, ``(C, H, A)``
        """
        shape = (n_sequences, self.horizon)
        mean_times = np.exp(np.random.uniform(0.0, np.log(max(self.horizon / 2, 1.0)), (n_sequences, 1)))
        is_new = np.random.uniform(size=shape) < 1 / mean_times
        is_new[:, 0] = True
        drawn_at = np.maximum.accumulate(np.where(is_new, np.arange(self.horizon), 0), axis=1)
        scales = np.exp(np.random.uniform(np.log(SMALLEST_NOISE), np.log(LARGEST_NOISE), (n_sequences, 1, 1)))
        drawn = scales * np.random.standard_normal((*shape, n_actions))
        return np.take_along_axis(drawn, drawn_at[..., np.newaxis], axis=1)

    def varied(self, parents: np.ndarray) -> np.ndarray:
        """
        :param parents: sequences of offsets, ``(C, H, A)``
        :return: the same with other offsets in one segment of random place and length: new ones, added or instead, their mean,
            or none, ``(C, H, A)``
        """
        n_sequences, horizon, n_actions = parents.shape
        starts = np.random.randint(0, horizon, (n_sequences, 1))
        lengths = np.exp(np.random.uniform(0.0, np.log(horizon), (n_sequences, 1)))
        times = np.arange(horizon)
        is_inside = ((times >= starts) & (times < starts + np.ceil(lengths)))[..., np.newaxis]
        drawn = self.random_offsets(n_sequences, n_actions)
        means = (parents * is_inside).sum(axis=1, keepdims=True) / is_inside.sum(axis=1, keepdims=True)
        kinds = np.random.randint(4, size=(n_sequences, 1, 1))
        choices = [parents + SHARE_ADDED * drawn, drawn, np.broadcast_to(means, parents.shape)]
        return np.where(is_inside, np.select([kinds == kind for kind in range(3)], choices, 0.0), parents)

    @th.no_grad()
    def plan(
        self,
        observation: th.Tensor,
        context: RolloutContext,
        q_functions: Sequence[QFunction],
        n_members: int,
        start: np.ndarray | None = None,
    ) -> Plan:
        """
        :param observation: raw observation, ``(1, O)``
        :param context: policy, model with dealt members, units and discount factor
        :param q_functions: critics, whose minimum values the last state
        :param n_members: number of members of the model :math:`E`; a sequence is judged by the mean over all of them
        :param start: offsets that the search starts from, ``(H, A)``. With them, it takes two rounds
        :return: the best sequence; the policy's, with offsets of zero, is one of those compared
        """
        n_actions = context.actor(context.units.normalize_observations(observation)).shape[1]
        candidates = self.random_offsets(self.n_candidates, n_actions)
        candidates[0] = 0.0
        if start is not None:
            half = self.n_candidates // 2
            candidates[1:half] = self.varied(np.repeat(start[np.newaxis], half - 1, axis=0))
            candidates[1] = start
        returns = self._returns(candidates, observation, context, q_functions, n_members)
        of_policy, means = returns[:, 0], returns.mean(axis=0)
        spread = float(means[np.isfinite(means)].std()) if np.isfinite(means).any() else 0.0

        def scores(returns: np.ndarray, offsets: np.ndarray) -> np.ndarray:
            return returns.mean(axis=0) - spread * price(offsets)

        for _ in range(self.n_rounds - 1 if start is None else 1):
            elites = np.argsort(-scores(returns, candidates))[: self.n_elites]
            children = self.varied(candidates[np.random.choice(elites, self.n_candidates)])
            children[0] = candidates[elites].mean(axis=0)
            candidates = np.concatenate([candidates[elites], children])
            of_children = self._returns(children, observation, context, q_functions, n_members)
            returns = np.concatenate([returns[:, elites], of_children], axis=1)
        final = scores(returns, candidates)
        chosen, of_elites = int(np.argmax(final)), self.n_elites
        # The mean of the elites has less of the noise of the search, which a policy that imitates plans cannot learn
        with np.errstate(invalid="ignore"):  # there is no advantage where nothing is finite
            if final[of_elites] >= final[chosen] - TOLERANCE * (final[chosen] - of_policy.mean()):
                chosen = of_elites
            return Plan(candidates[chosen], returns[:, chosen] - of_policy, spread)

    def _returns(
        self,
        offsets: np.ndarray,
        observation: th.Tensor,
        context: RolloutContext,
        q_functions: Sequence[QFunction],
        n_members: int,
    ) -> np.ndarray:
        """
        :return: discounted returns of sequences, ``(C, H, A)``, with each member of the model; minus infinity where they are
            not finite, ``(E, C)``
        """
        of_steps = th.as_tensor(offsets, dtype=observation.dtype, device=observation.device).flatten(1)
        of_steps = of_steps.repeat(n_members, 1)  # (E * C, H * A)
        rollout = start_rollout(observation.expand(len(of_steps), -1), context)
        planned = PlannedState(*rollout, of_steps)
        parameters = parameters_of_modules(context.actor)
        planned, total = context.steps.follow(planned, self.horizon, parameters, context)
        values = th.stack([q_function(planned.network_inputs, planned.actions) for q_function in q_functions]).amin(dim=0)
        total = total + context.gamma**self.horizon * expected(values, planned.alive)
        returns = total.reshape(n_members, len(offsets)).double().cpu().numpy()
        return np.where(np.isfinite(returns), returns, -np.inf)
