"""Spaces: flat observations and back, which are refused, and the same training whatever the space."""

import copy
import re
from functools import cache

import numpy as np
import pytest
import torch as th
from goals import N_STEPS, GoalEnv
from gymnasium import spaces
from settings import SMALL
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_mpg import MPG, PriorModel
from sb3_mpg.common.buffers import RecordedSteps
from sb3_mpg.common.spaces import FlatObservations, TupleAsDict, check_spaces, flat_box
from sb3_mpg.common.trust.weighting import make_weighting_rule
from sb3_mpg.common.units import Units

pytestmark = pytest.mark.usefixtures("models_are_fitted_once")

FLOATS = spaces.Box(-1, 1, (2,), np.float32)
DICT = spaces.Dict({"b": spaces.Box(-2, 2, (2, 2), np.float64), "a": spaces.Box(0, 5, (3,), np.int64)})
HER = {"replay_buffer_class": HerReplayBuffer}


class TestFlatObservations:
    def test_order_is_that_of_gymnasium(self):
        flat = FlatObservations(DICT)
        observation = DICT.sample()
        batch = {key: th.as_tensor(part)[None] for key, part in observation.items()}
        th.testing.assert_close(flat.flatten(batch)[0], th.as_tensor(spaces.flatten(DICT, observation)).float())
        assert flat.names == ("a[0]", "a[1]", "a[2]", "b[0, 0]", "b[0, 1]", "b[1, 0]", "b[1, 1]")
        assert flat.n_elements == 7

    @pytest.mark.parametrize("space", [DICT, FLOATS, spaces.Box(-1, 1, (2, 3), np.float64)])
    def test_there_and_back(self, space):
        flat, numbers = FlatObservations(space), th.randn(5, FlatObservations(space).n_elements)
        observations = flat.unflatten(numbers)
        th.testing.assert_close(flat.flatten(observations), numbers)
        if isinstance(space, spaces.Dict):
            assert {key: part.shape for key, part in observations.items()} == {"a": (5, 3), "b": (5, 2, 2)}
        else:
            assert observations.shape == (5, *space.shape)

    def test_rows_of_another_size_are_not_merged(self):
        policy = MPG("MlpPolicy", GoalEnv("flat"), **SMALL).policy
        with pytest.raises(RuntimeError, match="size of tensor"):
            policy.actor(th.zeros(2, 2))

    def test_box(self):
        box = FlatObservations(DICT).box
        assert box == spaces.Box(np.float32([0] * 3 + [-2] * 4), np.float32([5] * 3 + [2] * 4))
        assert flat_box(spaces.Box(-1e300, 1e300, (1, 1), np.float64)).high[0] == np.inf

    def test_rows_of_a_replay_buffer(self):
        arrays = {"a": np.arange(24).reshape(4, 2, 3), "b": np.arange(32.0).reshape(4, 2, 2, 2)}
        flat = FlatObservations(DICT)
        assert flat.gather(arrays, slice(3)).shape == (3, 2, 7)
        rows = flat.gather(arrays, np.array([0, 3]), np.array([1, 0]))
        np.testing.assert_array_equal(rows, [[3, 4, 5, 4, 5, 6, 7], [18, 19, 20, 24, 25, 26, 27]])
        assert rows.dtype == np.float32

    def test_normalisation_of_some_keys(self):
        """Statistics of `VecNormalize` reach the elements of its keys, and no others."""
        env = VecNormalize(DummyVecEnv([GoalEnv]), norm_obs_keys=["observation"], clip_obs=1.5)
        env.obs_rms["observation"].mean, env.obs_rms["observation"].var = np.array([1.0, 2.0]), np.array([4.0, 0.01])
        env.training = False
        raw = {key: np.full((1, *space.shape), 2.5, np.float32) for key, space in env.observation_space.spaces.items()}
        expected = env.normalize_obs(raw)
        units = Units.of(env.action_space, "cpu", env=env)
        normalised = units.normalize_observations(th.full((1, 4), 2.5))
        th.testing.assert_close(
            FlatObservations(env.observation_space).unflatten(normalised)["observation"].numpy(), expected["observation"]
        )
        assert normalised.tolist()[0] == [2.5, 2.5, pytest.approx(0.75), 1.5]


@pytest.mark.parametrize(
    ("observation_space", "action_space", "message"),
    [
        (spaces.Discrete(3), FLOATS, "observations, which must be a Box of numbers.*FlattenObservation"),
        (spaces.Dict({"a": FLOATS, "b": spaces.Discrete(2)}), FLOATS, r"Box of numbers.*Discrete\(2\) at 'b'"),
        (spaces.Tuple([FLOATS, spaces.MultiBinary(2)]), FLOATS, r"Box of numbers.*MultiBinary\(2\) at 1"),
        (spaces.Dict({"a": spaces.Dict({"b": FLOATS})}), FLOATS, "flatten what is nested"),
        (spaces.Dict({}), FLOATS, "need observations"),
        (spaces.Box(0, 1, (0,), np.float32), FLOATS, "Box of observations needs an axis with an element"),
        (spaces.Dict({"a": spaces.Box(0, 1, (), np.float32)}), FLOATS, "observations needs an axis with an element.*at 'a'"),
        (spaces.Box(0, 255, (8, 8, 3), np.uint8), FLOATS, "images are not supported"),
        (spaces.Dict({"camera": spaces.Box(0, 255, (8, 8, 3), np.uint8)}), FLOATS, "images are not supported.*'camera'"),
        (FLOATS, spaces.Discrete(3), "actions, which must be a Box of floats.*discrete actions"),
        (FLOATS, spaces.Box(-1, 1, (2,), np.int64), "actions, which must be a Box of floats"),
        (FLOATS, spaces.Box(-np.inf, 1, (2,), np.float32), "bounds of the action space, which must be finite"),
        (FLOATS, spaces.Box(-3e38, 3e38, (2,), np.float32), "bounds of the action space, which must be finite"),
        (FLOATS, spaces.Box(-1e300, 1, (2,), np.float64), "bounds of the action space, which must be finite"),
    ],
)
def test_spaces_without_a_gradient_are_refused(observation_space, action_space, message):
    with pytest.raises(ValueError, match=message):
        check_spaces(observation_space, action_space)


@pytest.mark.parametrize(
    "observation_space",
    [DICT, spaces.Tuple([FLOATS, FLOATS]), spaces.Box(-np.inf, np.inf, (2, 3), np.float64), spaces.Box(0, 9, (2,), np.uint8)],
)
def test_spaces_of_numbers_are_accepted(observation_space):
    check_spaces(observation_space, spaces.Box(-1e3, 1e3, (2, 3), np.float64))


def train(env, policy="MultiInputPolicy", n_steps=80, **kwargs):
    return MPG(policy, env, **{**SMALL, "horizons": (0, 2), **kwargs}).learn(n_steps)


@cache
def trained_on_a_flat_box():
    return train(GoalEnv("flat"), "MlpPolicy")


class TestTraining:
    @pytest.mark.parametrize(
        ("kind", "policy"), [("goal", "MultiInputPolicy"), ("tuple", "MultiInputPolicy"), ("table", "MlpPolicy")]
    )
    def test_the_space_changes_nothing(self, kind, policy):
        """Dictionaries, tuples and tables of the same numbers give the same networks, bit for bit."""
        flat = trained_on_a_flat_box()
        model = train(GoalEnv(kind), policy)
        for name, tensor in flat.policy.state_dict().items():
            assert th.equal(tensor, model.policy.state_dict()[name]), name
        observation, numbers = GoalEnv(kind).reset(seed=3)[0], GoalEnv("flat").reset(seed=3)[0]
        np.testing.assert_array_equal(model.predict(observation)[0], flat.predict(numbers)[0])
        th.testing.assert_close(model.policy_gradient(observation, 2), flat.policy_gradient(numbers, 2), rtol=0, atol=0)
        for env in (GoalEnv(kind), model.get_env()):
            assert evaluate_policy(model, env, 2, warn=False)[0] < 0

    def test_tuples_under_vec_normalize(self):
        """It takes no tuples, but what replaces them."""
        tuples = DummyVecEnv([lambda: GoalEnv("tuple")])
        with pytest.raises(ValueError, match=r"VecNormalize takes no Tuple of observations, got Tuple.*TupleAsDict\(env\)"):
            MPG("MultiInputPolicy", VecNormalize(tuples, norm_obs=False), **SMALL)
        model = train(VecNormalize(TupleAsDict(tuples), norm_obs_keys=["2"]), n_steps=60)
        assert model.units().is_normalized.tolist() == [False, False, True, True]
        assert model.predict(GoalEnv("tuple").reset(seed=0)[0])[0].shape == (1,)

    def test_extractors_of_sb3_get_observations_of_the_space(self):
        """Also when they are compiled."""
        policy_kwargs = {"net_arch": [8], "features_extractor_class": CombinedExtractor}
        kwargs = {"policy_kwargs": policy_kwargs, "horizons": (2,), "weighting": "constant", "residual": False, "n_steps": 60}
        models = [train(GoalEnv(), **kwargs, compile=compile) for compile in (False, True)]
        actions = [model.predict(GoalEnv().reset(seed=3)[0])[0] for model in models]
        np.testing.assert_allclose(*actions, rtol=1e-4)
        table = train(GoalEnv("table"), "MlpPolicy", policy_kwargs={"features_extractor_class": FlattenExtractor})
        assert table.actor.features_extractor.features_dim == 4

    def test_integers_are_cast(self):
        class Stairs(GoalEnv):
            def __init__(self):
                super().__init__("flat")
                self.observation_space = spaces.Box(-30, 30, (4,), np.int32)

            def _show(self):
                return np.round(10 * super()._show()).astype(np.int32)

        class Model(PriorModel):
            def transition(self, states, actions):
                _, goal, position, speed = states.split(1, dim=1)
                return th.cat([position, goal, position + 0.1 * speed, speed + actions], dim=1)

            def reward(self, states, actions, next_states):
                return -0.1 * (next_states[:, :1] - next_states[:, 1:2]).abs()

        model = train(Stairs(), "MlpPolicy", prior_model=Model())
        assert model.replay_buffer.observations.dtype == np.int32
        assert np.isfinite(model.predict(Stairs().reset(seed=0)[0])[0]).all()
        recorded = RecordedSteps(model.replay_buffer, lambda actions: actions, "cpu").observations()
        np.testing.assert_array_equal(recorded, model.replay_buffer.observations[:80, 0])

    def test_actions_of_any_shape(self):
        """The same numbers, in a table of one row."""
        flat = trained_on_a_flat_box()
        model = train(GoalEnv("flat", spaces.Box(-1, 1, (1, 1), np.float32)), "MlpPolicy")
        assert model.predict(np.zeros(4, np.float32))[0].shape == (1, 1)
        assert model.predict(np.zeros((5, 4), np.float32))[0].shape == (5, 1, 1)
        for name, tensor in flat.policy.state_dict().items():
            assert th.equal(tensor, model.policy.state_dict()[name]), name

    def test_actions_of_a_fixed_value(self):
        """`GoalEnv` asserts that each action lies in the space."""
        space = spaces.Box(np.float32([[0.5, -2.0]]), np.float32([[0.5, 1.0]]))
        model = train(GoalEnv("flat", space), "MlpPolicy")
        actions = model.predict(np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32))[0]
        assert (actions[:, 0, 0] == 0.5).all()
        assert np.isfinite(actions).all()
        assert np.isfinite(model.replay_buffer.actions[:80]).all()
        assert th.isfinite(model.policy_gradient(np.zeros((3, 4), np.float32), 2)).all()


class TestOrder:
    @pytest.mark.parametrize("is_loaded", [False, True])
    def test_another_order_is_refused(self, is_loaded, tmp_path):
        """Gymnasium says that the spaces are equal."""
        env = GoalEnv()
        env.observation_space = spaces.Dict(list(env.observation_space.spaces.items())[::-1])
        assert env.observation_space == GoalEnv().observation_space
        model = MPG("MultiInputPolicy", GoalEnv(), **SMALL, horizons=(0, 2))
        if is_loaded:
            model.save(tmp_path / "model.zip")
            model = MPG.load(tmp_path / "model.zip", env=env)
        else:
            model.set_env(env)
        observation = env.reset(seed=0)[0]
        np.testing.assert_array_equal(model.predict(observation)[0], model.predict(dict(reversed(observation.items())))[0])
        with pytest.raises(ValueError, match=r"order \['observation',.*of the algorithm in the order \['achieved_goal',"):
            model.learn(60)
        assert model.num_timesteps == 0


class StrictEnv(GoalEnv):
    """Takes no actions but those of its space."""

    def step(self, action):
        assert self.action_space.contains(action), (action, action.dtype)
        return super().step(action)


class TestActionsOfTheSpace:
    # Twice the half range from the lower bound is more than the upper bound, in single precision
    ROUNDED_UP = (-0.7878449, 0.079942696)

    def test_rounding_stays_within_the_bounds(self):
        low, high = np.float32(self.ROUNDED_UP)
        assert low + (high - low) > high
        env = StrictEnv("flat", spaces.Box(low, high, (1,), np.float32))
        model = train(env, "MlpPolicy", horizons=(0,), weighting="constant", exploration_noise=3.0)
        assert (model.replay_buffer.actions[:80] == 1).any()

    @pytest.mark.parametrize("dtype", [np.float16, np.float64])
    def test_types_are_those_of_the_space(self, dtype):
        """While training, and of a policy."""
        env = StrictEnv("flat", spaces.Box(-1, 1, (1,), dtype))
        model = train(env, "MlpPolicy", horizons=(0,), weighting="constant")
        assert model.predict(np.zeros((3, 4), np.float32))[0].dtype == dtype


class TestObservationsOfOtherSpaces:
    @pytest.mark.parametrize(
        ("kind", "observation", "got"),
        [
            ("goal", np.zeros(4, np.float32), "ndarray"),
            ("goal", {"observation": np.zeros(2, np.float32)}, r"\['observation'\]"),
            ("goal", GoalEnv("tuple").reset(seed=0)[0], "tuple"),
            ("tuple", GoalEnv("tuple").reset(seed=0)[0][:2], "tuple"),
            ("tuple", list(GoalEnv("tuple").reset(seed=0)[0]), "list"),
        ],
        ids=["flat", "a key", "tuple", "short tuple", "list"],
    )
    def test_keys_are_told(self, kind, observation, got):
        model = MPG("MultiInputPolicy", GoalEnv(kind), **SMALL, horizons=(0, 2))
        keys = list(model.observation_space.spaces)
        with pytest.raises(ValueError, match=rf"with the keys {re.escape(str(keys))}, got {got}"):
            model.predict(observation)
        with pytest.raises(ValueError, match="with the keys"):
            model.policy_gradient(observation, 2)


class TestGoals:
    def test_new_goals_reach_model_and_reward(self):
        """The model is fitted to the goals that its rollouts start with, and to the rewards of these goals."""
        model = train(GoalEnv(is_sparse=True), **HER)
        recorded = RecordedSteps(model.replay_buffer, lambda actions: actions, "cpu")
        for steps in (recorded.sample(300), recorded.latest(80)):
            achieved, goals = steps.next_observations[:, 0], steps.next_observations[:, 1]
            assert th.equal(goals, steps.observations[:, 1])
            th.testing.assert_close(steps.rewards[:, 0], -((achieved - goals).abs() > 0.1).float())
            # Goals of the same episode are near; those of the environment are anywhere
            assert (achieved == goals).any()
            stored = model.replay_buffer.observations["desired_goal"][:80, 0, 0]
            share_new = 1 - np.isin(goals.numpy(), stored).mean()
            assert 0.6 < share_new < 0.95
        assert not np.isin(recorded.sample_observations(50)[:, 1].numpy(), stored).all()

    def test_unfinished_episodes_keep_their_goals(self):
        model = train(GoalEnv(), **HER, n_steps=N_STEPS + 25)
        recorded = RecordedSteps(model.replay_buffer, lambda actions: actions, "cpu")
        newest = recorded.latest(5)
        np.testing.assert_array_equal(newest.observations[:, 1], np.full(5, model.get_env().get_attr("goal")[0], np.float32))

    def test_rewards_of_new_goals_are_those_of_the_present_environment(self):
        """SB3's buffer keeps the environment that it was made for, and its copies have none."""
        model = train(GoalEnv(), **HER)
        for algorithm in (copy.deepcopy(model), model):
            algorithm.set_env(DummyVecEnv([lambda: GoalEnv(is_sparse=True)]))
            n_updates = algorithm._n_updates
            assert algorithm.learn(20, reset_num_timesteps=False)._n_updates == n_updates + 20
            steps = RecordedSteps(algorithm.replay_buffer, lambda actions: actions, "cpu").sample(300)
            stored = algorithm.replay_buffer.observations["desired_goal"]
            is_new = ~np.isin(steps.observations[:, 1].numpy(), stored)
            assert is_new.any() and np.isin(steps.rewards[is_new], [-1, 0]).all()

    def test_a_copy_goes_on(self):
        model = train(GoalEnv(), **HER)
        assert copy.deepcopy(model).learn(20, reset_num_timesteps=False)._n_updates == model._n_updates + 20


class TestCritics:
    def test_one_critic(self):
        kwargs = {"policy_kwargs": {"net_arch": [8], "n_critics": 1}}
        train(GoalEnv("flat"), "MlpPolicy", weighting="constant", **kwargs)
        train(GoalEnv("flat"), "MlpPolicy", horizons=(0,), **kwargs)

    def test_no_critic(self):
        with pytest.raises(ValueError, match="`n_critics` must be a whole number, 1 or more, got 0"):
            MPG("MlpPolicy", GoalEnv("flat"), policy_kwargs={"n_critics": 0})

    def test_measured_weights_need_two(self):
        """It is said when they are used: a policy of one critic can be created, loaded and asked for actions."""
        model = MPG("MlpPolicy", GoalEnv("flat"), **{**SMALL, "policy_kwargs": {"net_arch": [8], "n_critics": 1}})
        assert model.predict(np.zeros(4, np.float32))[0].shape == (1,)
        with pytest.raises(ValueError, match="compare the critics with each other, of which there is one"):
            model.learn(60)
        assert model.num_timesteps == 0

    def test_measured_weights_of_a_callback(self):
        def measure(variables, _):
            algorithm = variables["self"]
            if algorithm.num_timesteps == 50:
                algorithm.weighting_rule = make_weighting_rule("measured", (0, 2))

        kwargs = {**SMALL, "policy_kwargs": {"net_arch": [8], "n_critics": 1}, "weighting": "constant", "horizons": (0, 2)}
        model = MPG("MlpPolicy", GoalEnv("flat"), **kwargs)
        with pytest.raises(ValueError, match="compare the critics with each other, of which there is one"):
            model.learn(60, callback=lambda *args: measure(*args) or True)
        assert model.num_timesteps == 50


class TestNSteps:
    def test_is_the_target_from_the_replay_buffer(self):
        models = [
            train(GoalEnv("flat"), "MlpPolicy", n_steps=80, **kwargs)
            for kwargs in ({"value_target": "n_step_replay", "value_target_kwargs": {"n_steps": 3}},)
        ]
        models.append(MPG("MlpPolicy", GoalEnv("flat"), **SMALL, horizons=(0, 2), n_steps=3).learn(80))
        states = [model.policy.state_dict() for model in models]
        assert all(th.equal(tensor, states[1][name]) for name, tensor in states[0].items())
        assert models[1].n_steps == 3

    @pytest.mark.parametrize(
        "kwargs",
        [{"value_target": "n_step_simulator"}, {"value_target": "n_step_replay", "value_target_kwargs": {"n_steps": 2}}],
    )
    def test_a_contradiction_is_refused(self, kwargs):
        with pytest.raises(ValueError, match="`n_steps=3` asks for a target from 3 recorded steps, but value_target="):
            MPG("MlpPolicy", GoalEnv("flat"), n_steps=3, **kwargs)

    @pytest.mark.parametrize("kwargs", [{"n_steps": 3}, {"optimize_memory_usage": True}])
    def test_what_sb3s_buffers_do_not_support(self, kwargs):
        with pytest.raises(ValueError, match=r"for a Box of observations only, got Dict.*FlattenObservation"):
            MPG("MultiInputPolicy", GoalEnv(), **kwargs)
