"""The same seed gives the same actions and rewards."""

import numpy as np


def test_same_seed_same_training_and_actions(any_case):
    results = []
    kwargs = {"max_staleness": 0} if "n_learners" in any_case.kwargs else {}
    for _ in range(2):
        np.random.seed(len(results))  # not the seed of the algorithm
        model = any_case.make(train_freq=4, **kwargs).learn(32)
        env = model.get_env()
        observation = env.reset()
        for _ in range(20):
            action, _ = model.predict(observation)
            observation, reward, _, _ = env.step(action)
            results.append((action.item(), reward.item()))
    assert results[:20] == results[20:]
    assert len(set(results)) == 20


def test_another_seed_another_training(case):
    first, second = (case.make(seed=seed).learn(12).predict(np.ones(2, np.float32))[0] for seed in (1, 2))
    assert first != second
