"""n-step returns of the replay buffer, by SB3's argument."""

import pytest
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.env_util import make_vec_env

from contract.cases import CASES


# The papers' algorithms have an argument of the same name, for the steps of their simulator
@pytest.mark.parametrize("case", [case for case in CASES if "n_steps" not in case.kwargs], ids=str)
def test_n_steps(case):
    model = case.make(make_vec_env(case.env, 2), n_steps=3, gamma=0.989, train_freq=4)
    assert isinstance(model.replay_buffer, NStepReplayBuffer)
    assert model.replay_buffer.n_steps == 3 and model.replay_buffer.gamma == 0.989
    assert model.learn(24)._n_updates == 2
    samples = model.replay_buffer.sample(50)
    assert samples.discounts.min().item() == pytest.approx(0.989**3)
