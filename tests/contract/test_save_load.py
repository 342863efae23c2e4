"""What files hold, and what may change when they are loaded."""

import base64
import copy
import io
import json
import tempfile
import warnings
import zipfile

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.buffers import DictReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import get_device
from stable_baselines3.common.vec_env import DummyVecEnv


def observations_of(model, n=10):
    return np.stack([model.observation_space.sample() for _ in range(n)])


def random_state(state_dict):
    """Every tensor of another value, as far as that is possible for any network."""
    return {name: th.rand_like(tensor) for name, tensor in state_dict.items()}


def networks_of(parameters):
    return {name: tensors for name, tensors in parameters.items() if "optim" not in name}


def assert_same_tensors(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        th.testing.assert_close(second[name].cpu(), tensor.cpu(), rtol=0, atol=0, msg=name)


def test_parameters_of_other_names_are_refused(case):
    model = case.make()
    parameters = copy.deepcopy(model.get_parameters())
    for exact_match in (True, False):
        with pytest.raises(ValueError, match="not_an_object"):
            model.set_parameters({**parameters, "not_an_object": {}}, exact_match=exact_match)
    last = list(parameters)[-1]
    with pytest.raises(ValueError):
        model.set_parameters({name: tensors for name, tensors in parameters.items() if name != last}, exact_match=True)
    for name, tensors in networks_of(parameters).items():
        last = list(tensors)[-1]
        incomplete = {**parameters, name: {key: tensor for key, tensor in tensors.items() if key != last}}
        with pytest.raises(RuntimeError, match="Missing key"):
            model.set_parameters(incomplete, exact_match=True)


def test_parameters_may_be_set_in_part(case):
    model = case.make().learn(12)
    before = copy.deepcopy(model.get_parameters())
    new = {name: random_state(tensors) for name, tensors in networks_of(before).items()}
    for tensors in new.values():
        tensors.popitem()
    model.set_parameters(new, exact_match=False)
    for name, tensors in networks_of(model.get_parameters()).items():
        *all_but_last, last = tensors
        assert th.equal(tensors[last], before[name][last])
        for key in all_but_last:
            assert th.equal(tensors[key], new[name][key]) and not th.equal(tensors[key], before[name][key]), key


def test_a_loaded_algorithm_acts_and_learns(any_case, tmp_path):
    model = any_case.make().learn(14)
    model.policy.load_state_dict(random_state(model.policy.state_dict()))
    observations = observations_of(model)
    actions, _ = model.predict(observations, deterministic=True)
    model.save(tmp_path / "model.zip")
    for device in ("auto", "cpu", "cuda"):
        loaded = any_case.cls.load(str(tmp_path / "model"), env=model.get_env(), device=device)
        assert loaded.device.type == loaded.policy.device.type == get_device(device).type
        for name, tensors in networks_of(model.get_parameters()).items():
            assert_same_tensors(tensors, loaded.get_parameters()[name])
        np.testing.assert_allclose(loaded.predict(observations, deterministic=True)[0], actions, rtol=1e-4)
    assert loaded.learn(14)._n_updates == 2 * model._n_updates == 8


def test_a_loaded_algorithm_needs_no_environment_to_act(case, tmp_path):
    model = case.make().learn(14)
    model.save(tmp_path / "model.zip")
    loaded = case.cls.load(tmp_path / "model.zip")
    assert loaded.get_env() is None
    observations = observations_of(model)
    np.testing.assert_array_equal(loaded.predict(observations)[0], model.predict(observations)[0])
    loaded.set_env(case.env())
    assert loaded.learn(14)._n_updates == 8


def test_the_environment_may_be_exchanged(case, tmp_path):
    def vec_env(n_envs=1):
        return DummyVecEnv([case.env] * n_envs)

    model = case.make(vec_env(), learning_starts=5, train_freq=4).learn(12)
    model.set_env(vec_env(), force_reset=True)
    assert model._last_obs is None
    assert model.learn(12).num_timesteps == 12
    # It is wrapped if need be
    model.set_env(case.env())
    model.learn(12)
    with pytest.raises(AssertionError):
        model.set_env(vec_env(2))

    model.set_env(model.get_env(), force_reset=False)
    assert model._last_obs is not None
    assert model.learn(12, reset_num_timesteps=False).num_timesteps == 24
    model.save(tmp_path / "model.zip")
    kept = case.cls.load(tmp_path / "model.zip", env=model.get_env(), force_reset=False)
    assert kept._last_obs is not None
    assert kept.learn(12, reset_num_timesteps=False).num_timesteps == 36
    other = case.cls.load(tmp_path / "model.zip", env=case.env(), force_reset=True)
    assert other._last_obs is None
    assert other.learn(12, reset_num_timesteps=False).num_timesteps == 36
    two = case.cls.load(tmp_path / "model.zip", env=vec_env(2))
    assert two.n_envs == 2 and two.learn(16).num_timesteps == 16


def test_attributes_are_excluded_included_and_replaced(case, tmp_path, capsys):
    path = tmp_path / "model.zip"
    model = case.make(verbose=2)
    model.save(path, exclude=["verbose"])
    assert case.cls.load(path).verbose != 2
    model.save(path, exclude=["verbose"], include=["verbose"])
    capsys.readouterr()
    replaced = {"learning_rate": 2e-5, "no_attribute": 1.0}
    loaded = case.cls.load(path, custom_objects=replaced, print_system_info=True)
    assert "CURRENT SYSTEM INFO" in capsys.readouterr().out
    assert loaded.verbose == 2 and loaded.learning_rate == 2e-5 and loaded.lr_schedule(1.0) == 2e-5
    assert not hasattr(loaded, "no_attribute")
    loaded = case.cls.load(path, verbose=1, learning_rate=0.5)
    assert loaded.verbose == 1 and loaded.learning_rate == loaded.lr_schedule(0.0) == 0.5
    with pytest.raises(ValueError, match="net_arch"):
        case.cls.load(path, policy_kwargs={"net_arch": [16]})


def test_the_replay_buffer(any_case, tmp_path):
    model = any_case.make(any_case.env(max_steps=4)).learn(20)
    old = copy.deepcopy(model.replay_buffer)
    path = tmp_path / "logs" / "buffer"
    with pytest.warns(UserWarning, match="does not exist"):
        model.save_replay_buffer(path)
    model.replay_buffer = None
    model.load_replay_buffer(path)
    new = model.replay_buffer
    assert new.device == model.device and new.size() == old.size() == 20
    names = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
    for name in names:
        np.testing.assert_array_equal(getattr(new, name), getattr(old, name), err_msg=name)
    assert new.timeouts.sum() == 5
    steps = [getattr(old, name)[:20] for name in names]
    new.extend(*steps[:5], [[{"TimeLimit.truncated": bool(timeout)} for timeout in row] for row in steps[5]])
    assert new.size() == 40
    np.testing.assert_array_equal(new.rewards[:20], new.rewards[20:40])
    np.testing.assert_array_equal(new.timeouts[:20], new.timeouts[20:40])
    assert model.learn(4, reset_num_timesteps=False).replay_buffer.size() == 44


@pytest.mark.parametrize("optimize_memory_usage", [False, True])
def test_a_trajectory_that_is_cut_is_pointed_out(case, optimize_memory_usage):
    model = case.make(
        buffer_size=30,
        optimize_memory_usage=optimize_memory_usage,
        replay_buffer_kwargs={"handle_timeout_termination": not optimize_memory_usage},
    )
    messages = []
    for kwargs in ({}, {"reset_num_timesteps": False}, {}):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.learn(16, **kwargs)
        messages.append([str(warning.message) for warning in caught])
    assert messages[:2] == [[], []]
    assert len(messages[2]) == optimize_memory_usage
    assert all("The last trajectory in the replay buffer will be truncated" in message for message in messages[2])


def test_policy_and_actor_have_files_of_their_own(case, tmp_path):
    model = case.make().learn(14)
    policy = model.policy
    policy.load_state_dict(random_state(policy.state_dict()))
    observations = observations_of(model)
    actions, _ = policy.predict(observations, deterministic=True)
    np.testing.assert_allclose(policy.actor.predict(observations, deterministic=True)[0], actions, rtol=1e-4)
    for module in (policy, policy.actor):
        module.save(tmp_path / "module.pkl")
        loaded = type(module).load(tmp_path / "module.pkl")
        assert_same_tensors(module.state_dict(), loaded.state_dict())
        np.testing.assert_allclose(loaded.predict(observations, deterministic=True)[0], actions, rtol=1e-4)


def test_an_unreadable_attribute_may_be_replaced(case, tmp_path):
    path = tmp_path / "model.zip"
    case.make(learning_rate=lambda progress: 1.0).save(path)
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    data = json.loads(contents["data"])
    pickled = base64.b64decode(data["learning_rate"][":serialized:"])
    assert b"CodeType" in pickled
    data["learning_rate"][":serialized:"] = base64.b64encode(pickled.replace(b"CodeType", b"CodeTyps")).decode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**contents, "data": json.dumps(data)}.items():
            archive.writestr(name, content)
    with pytest.warns(UserWarning, match="learning_rate.*custom_objects"):
        case.cls.load(path)
    # Warnings are errors
    loaded = case.cls.load(path, custom_objects={"learning_rate": lambda progress: 0.25})
    assert loaded.lr_schedule(1.0) == 0.25


def test_files_are_closed_unless_they_are_the_users(case, tmp_path):
    """A file that is left open is a warning, and warnings are errors."""
    model = case.make()
    for path in (tmp_path / "model", str(tmp_path / "model")):
        model.save(path)
        case.cls.load(path)
        model.save_replay_buffer(path)
        model.load_replay_buffer(path)
    for stream in (io.BytesIO(), tempfile.TemporaryFile()):
        with stream:
            model.save(stream)
            case.cls.load(stream)
            assert not stream.closed
            stream.seek(0)
            model.save_replay_buffer(stream)
            stream.seek(0)
            model.load_replay_buffer(stream)
            assert not stream.closed


def test_learning_rates_are_floats(case, tmp_path):
    def check(model):
        assert type(model.lr_schedule(1.0)) is float
        assert model.lr_schedule(0.5) == pytest.approx(0.5 * np.sin(1.0))

    model = case.make(learning_rate=lambda progress: progress * np.sin(1.0))
    check(model)
    model.save(tmp_path / "model.zip")
    check(case.cls.load(tmp_path / "model.zip"))


def test_default_networks_are_saved(case, tmp_path):
    model = case.make(policy_kwargs={"net_arch": None})
    model.save(tmp_path / "model.zip")
    loaded = case.cls.load(tmp_path / "model.zip")
    assert loaded.policy.net_arch == model.policy.net_arch and len(loaded.policy.net_arch) == 2


def test_arguments_of_the_replay_buffer(case):
    with pytest.raises(TypeError, match="no_argument"):
        case.make(replay_buffer_kwargs={"no_argument": 1})
    with pytest.raises(AssertionError, match="must be used with Dict obs space only"):
        case.make(replay_buffer_class=DictReplayBuffer)


def test_a_file_needs_its_spaces(case, tmp_path):
    case.make().save(tmp_path / "model.zip")
    other = make_vec_env(lambda: case.env(action_space=type(case.env().action_space)(-1, 1, (1,))), 1)
    with pytest.raises(ValueError, match="Action spaces do not match"):
        case.cls.load(tmp_path / "model.zip", env=other)
