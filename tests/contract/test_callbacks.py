"""Callbacks of SB3: what they see, and what they may do."""

import numpy as np
import pytest
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize


def episodes_of(case, n_envs=1, n_steps=5):
    return make_vec_env(lambda: case.env(max_steps=n_steps), n_envs, seed=0)


class Watch(BaseCallback):
    """Notes which of its methods are called."""

    def __init__(self, on_step=lambda: True):
        super().__init__()
        self.on_step_of_user, self.calls = on_step, []

    def _on_training_start(self):
        self.calls.append("training start")

    def _on_rollout_start(self):
        self.calls.append("rollout start")

    def _on_step(self):
        self.calls.append("step")
        return self.on_step_of_user()

    def _on_rollout_end(self):
        self.calls.append("rollout end")

    def _on_training_end(self):
        self.calls.append("training end")


def test_all_together(any_case, tmp_path):
    model = any_case.make()
    checkpoint = CheckpointCallback(save_freq=10, save_path=tmp_path)
    evaluation = EvalCallback(
        episodes_of(any_case),
        callback_on_new_best=StopTrainingOnRewardThreshold(reward_threshold=np.inf),
        callback_after_eval=StopTrainingOnNoModelImprovement(max_no_improvement_evals=100),
        best_model_save_path=tmp_path,
        log_path=tmp_path,
        eval_freq=8,
        n_eval_episodes=2,
        verbose=0,
    )
    on_event = CheckpointCallback(save_freq=1, save_path=tmp_path, name_prefix="event")
    event = EveryNTimesteps(n_steps=12, callback=on_event)
    callback = CallbackList([checkpoint, evaluation, event, StopTrainingOnMaxEpisodes(max_episodes=100)])
    model.learn(24, callback=callback)
    assert model.num_timesteps == 24

    # All of them see the variables of the training loop
    new_obs = callback.locals["new_obs"]
    assert model.observation_space.contains(new_obs[0])
    assert all(child.locals["new_obs"] is new_obs for child in (checkpoint, event, on_event))
    assert event.num_timesteps == event.n_calls == 24
    assert {path.stem for path in tmp_path.glob("*.zip")} == {
        *["rl_model_10_steps", "rl_model_20_steps", "event_12_steps", "event_24_steps", "best_model"]
    }
    with np.load(tmp_path / "evaluations.npz") as evaluations:
        assert evaluations["timesteps"].tolist() == [8, 16, 24]
        assert (evaluations["ep_lengths"] == 5).all()
        assert evaluation.best_mean_reward == evaluations["results"].mean(axis=1).max()
    assert any_case.cls.load(tmp_path / "event_12_steps.zip").num_timesteps == 12
    assert any_case.cls.load(tmp_path / "best_model.zip").num_timesteps in (8, 16, 24)

    # Lists and functions are callbacks, too
    model.learn(12, callback=[checkpoint, evaluation])
    steps = []
    model.learn(12, callback=lambda local, _: steps.append(local["self"].num_timesteps) or True)
    assert steps == list(range(1, 13))


def test_order_of_the_calls(any_case):
    watch = Watch()
    any_case.make(train_freq=3, learning_starts=3).learn(6, callback=watch)
    rollout = ["rollout start", "step", "step", "step", "rollout end"]
    assert watch.calls == ["training start", *rollout, *rollout, "training end"]


def test_a_callback_stops_training(any_case):
    model = any_case.make()
    watch = Watch(lambda: model.num_timesteps < 15)
    model.learn(1000, callback=watch)
    assert model.num_timesteps == 15 and watch.calls[-1] == "training end"
    # ... and it may go on
    assert model.learn(5, reset_num_timesteps=False).num_timesteps == 20


def test_largest_number_of_episodes(case):
    model = case.make(episodes_of(case, n_envs=2))
    callback = StopTrainingOnMaxEpisodes(max_episodes=3)
    model.learn(1000, callback=callback)
    assert callback.n_episodes == 6 and model.num_timesteps == 2 * 3 * 5


def test_evaluation_in_many_environments(case):
    callback = EvalCallback(episodes_of(case, n_envs=3), eval_freq=8, n_eval_episodes=3, verbose=0)
    case.make().learn(16, callback=callback)
    assert np.isfinite(callback.last_mean_reward)


def test_children_of_an_evaluation(case):
    seen = []

    class Child(BaseCallback):
        def _on_step(self):
            seen.append((type(self.parent), self.parent.last_mean_reward))
            return len(seen) < 2

    callback = EvalCallback(episodes_of(case), eval_freq=6, n_eval_episodes=1, callback_after_eval=Child(), verbose=0)
    model = case.make().learn(100, callback=callback)
    assert model.num_timesteps == 12
    assert [parent for parent, _ in seen] == [EvalCallback] * 2 and all(np.isfinite(reward) for _, reward in seen)


def test_evaluation_uses_the_statistics_of_training(any_case):
    env, eval_env = (VecNormalize(episodes_of(any_case), training=training) for training in (True, False))
    model = any_case.make(env)
    model.learn(16, callback=EvalCallback(eval_env, eval_freq=8, n_eval_episodes=1, verbose=0))
    observations = np.ones((1, 2))
    np.testing.assert_allclose(env.normalize_obs(observations), eval_env.normalize_obs(observations))
    assert (env.normalize_obs(observations) != observations).all()
    other = EvalCallback(episodes_of(any_case), eval_freq=8, n_eval_episodes=1, verbose=0)
    with pytest.warns(UserWarning, match="not of the same type"), pytest.raises(AssertionError):
        any_case.make(env).learn(16, callback=other)


def test_checkpoints_hold_buffer_and_statistics(any_case, tmp_path):
    env = VecNormalize(DummyVecEnv([any_case.env]))
    model = any_case.make(env)
    callback = CheckpointCallback(14, tmp_path, save_replay_buffer=True, save_vecnormalize=True)
    model.learn(14, callback=callback)
    loaded_env = VecNormalize.load(tmp_path / "rl_model_vecnormalize_14_steps.pkl", DummyVecEnv([any_case.env]))
    np.testing.assert_array_equal(loaded_env.obs_rms.mean, env.obs_rms.mean)
    loaded = any_case.cls.load(tmp_path / "rl_model_14_steps.zip", env=loaded_env)
    loaded.load_replay_buffer(tmp_path / "rl_model_replay_buffer_14_steps.pkl")
    # Callbacks come before the step is stored
    assert loaded.replay_buffer.size() == 13
    assert loaded.learn(4, reset_num_timesteps=False).num_timesteps == 18


def test_evaluations_are_logged_at_their_step(case, tmp_path):
    model = case.make(episodes_of(case))
    model.set_logger(configure(str(tmp_path), ["csv"]))
    callbacks = [EvalCallback(episodes_of(case), eval_freq=7, n_eval_episodes=1, verbose=0), LogEveryNTimesteps(5)]
    model.learn(30, callback=callbacks, log_interval=None)
    model.logger.close()
    table = np.genfromtxt(tmp_path / "progress.csv", delimiter=",", names=True)
    steps, evaluated = table["timetotal_timesteps"], np.isfinite(table["evalmean_reward"])
    assert steps[evaluated].tolist() == [7, 14, 21, 28]
    assert steps[~evaluated].tolist() == [5, 10, 15, 20, 25, 30]
    assert np.isfinite(table["traincritic_loss"][~evaluated][2:]).all()


@pytest.mark.filterwarnings("ignore::tqdm.TqdmExperimentalWarning")
def test_progress_bar(case, capsys):
    case.make().learn(12, progress_bar=True)
    assert "12/12" in "".join(capsys.readouterr())
