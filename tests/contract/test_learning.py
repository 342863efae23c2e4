"""Every algorithm learns the simplest task."""

import inspect

import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.noise import NormalActionNoise

from sb3_mpg.common.off_policy_model_algorithm import OffPolicyModelAlgorithm

STATES, ACTIONS = spaces.Box(-10, 10, (1,), np.float32), spaces.Box(-2, 2, (1,), np.float32)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_it_learns_to_brake(case, layer_norm):
    """
    Within ten steps, the best policy returns -3.4, no action -11.8, and the untrained networks less than -20.
    Normalised layers of 16 units, which SB3's TD3 does not have, need more steps.
    """
    is_ours = issubclass(case.cls, OffPolicyModelAlgorithm)
    if layer_norm and not is_ours:
        pytest.skip("it has no layer normalisation")
    env = make_vec_env(lambda: case.env(STATES, ACTIONS, max_steps=10), 1, seed=0)
    learning_rates = {"learning_rate", "critic_learning_rate"} & inspect.signature(case.cls).parameters.keys()
    model = case.make(
        env,
        gamma=0.5,
        tau=0.1,
        policy_kwargs={"net_arch": [16], **({"layer_norm": layer_norm} if is_ours else {})},
        buffer_size=1000,
        batch_size=32,
        learning_starts=100,
        action_noise=NormalActionNoise(np.zeros(1), np.full(1, 0.3)),
        **dict.fromkeys(learning_rates, case.learning_rate),
    )

    def mean_return():
        env.seed(1)
        return evaluate_policy(model, env, 20)[0]

    assert mean_return() < -20
    model.learn(900 if layer_norm else 300)
    assert mean_return() > -9
