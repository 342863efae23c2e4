"""``evaluate_policy`` takes the algorithm or its policy."""

import numpy as np
import pytest
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy


@pytest.mark.parametrize("of", ["algorithm", "policy"])
def test_evaluate_policy(case, of):
    model = case.make(case.env(max_steps=6))
    evaluated = model if of == "algorithm" else model.policy
    differences = []

    def callback(local, _):
        differences.append(np.abs(local["new_observations"] - local["observations"]).max())

    rewards, lengths = evaluate_policy(evaluated, model.get_env(), 3, callback=callback, return_episode_rewards=True)
    assert lengths == [6, 6, 6] and len(rewards) == 3 and max(rewards) < 0
    assert len(differences) == 18 and min(differences) > 0
    with pytest.raises(AssertionError, match="Mean reward below threshold"):
        evaluate_policy(evaluated, model.get_env(), 1, reward_threshold=0.0)
    with pytest.warns(UserWarning, match="not wrapped with a ``Monitor``"):
        evaluate_policy(evaluated, case.env(max_steps=6), 1)


@pytest.mark.parametrize("n_envs", [1, 2, 5])
def test_number_of_episodes(case, n_envs):
    episodes = []

    def callback(local, _):
        episodes.extend([True] * bool(local["done"]))

    env = make_vec_env(lambda: case.env(max_steps=3), n_envs)
    evaluate_policy(case.make(), env, 4, callback=callback)
    assert len(episodes) == 4
