"""The algorithms that the contract is checked for."""

from dataclasses import dataclass, field, replace
from typing import Any

import settings
from stable_baselines3 import TD3
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from contract.envs import GoalEnv, LinearSystem
from sb3_mpg import DVPG, MPG, NStepADP, NStepDPG

#: Settings with which every algorithm learns within a tenth of a second
SMALL = {**settings.SMALL, "policy_kwargs": {"net_arch": [8]}, "learning_starts": 10, "batch_size": 16, "buffer_size": 200}


@dataclass(frozen=True)
class Case:
    """
    An algorithm with settings.

    :param offers: what the environment must offer, and therefore all that it offers
    :param n_critics: smallest number of critics
    :param learning_rate: with which it learns small tasks quickly
    """

    name: str
    cls: type[OffPolicyAlgorithm]
    kwargs: dict[str, Any] = field(default_factory=dict)
    offers: tuple[str, ...] = ()
    n_critics: int = 1
    learning_rate: float = 2e-2

    def env(self, *args, **kwargs):
        return LinearSystem(*args, offers=self.offers, **kwargs)

    def goal_env(self):
        return GoalEnv(self.offers)

    def make(self, env=None, policy="MlpPolicy", **kwargs):
        return self.cls(policy, self.env() if env is None else env, **{**SMALL, **self.kwargs, **kwargs})

    def with_learner(self):
        return replace(self, name=f"{self.name}, a learner", kwargs={**self.kwargs, "n_learners": 1})

    def __str__(self):
        return self.name


MODEL, SIMULATOR = "prior_model", "make_simulator"
LEARNED = {"prior_model": "learned", "prior_model_kwargs": {"n_members": 2, "net_arch": (8,)}}
#: An algorithm joins by one line
OWN_CASES = [
    Case("MPG", MPG, {"horizons": (0, 3)}, offers=(MODEL,), n_critics=2),
    Case("MPG without a model", MPG, {"horizons": (0,)}),
    Case("MPG with learned dynamics", MPG, {"horizons": (0, 3), **LEARNED}, n_critics=2),
    # One critic, ReLU and unbounded gradients, as in the paper, diverge with larger rates
    Case("DVPG", DVPG, {"prior_model_kwargs": {"net_arch": (8,)}}, learning_rate=1e-2),
    Case("NStepDPG", NStepDPG, {"n_steps": 3, "batch_reuse": 2}, offers=(SIMULATOR,)),
    Case("NStepADP", NStepADP, {"n_steps": 3, "batch_reuse": 2}, offers=(MODEL, SIMULATOR)),
]
#: What SB3's own algorithm does not keep is not its contract
CASES = [*OWN_CASES, Case("TD3", TD3)]
CASES_AND_LEARNERS = [*CASES, *(case.with_learner() for case in OWN_CASES)]
