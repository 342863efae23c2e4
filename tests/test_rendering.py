"""Images and windows of both tasks."""

import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gym_check_env
from tasks import ENV_CLASSES, SAFE_STATE

import sb3_mpg_envs
from sb3_mpg_envs.inverted_pendulum import InvertedPendulumContiEnv
from sb3_mpg_envs.path_tracking import PathTrackingEnv, PathTrackingVecEnv

REPOSITORY = Path(sb3_mpg_envs.__file__).parent.parent


@pytest.mark.parametrize("env_class", ENV_CLASSES)
def test_render_mode_is_checked(env_class):
    with pytest.raises(ValueError, match="render_mode must be None or one of"):
        env_class(render_mode="ascii")


def test_check_env_draws_path_tracking(monkeypatch):
    pytest.importorskip("pygame")
    # The checker tries all render modes, and so opens windows
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    env = gym.make("PathTracking-v0", render_mode="rgb_array")
    gym_check_env(env.unwrapped)
    env.close()


def test_path_tracking_picture():
    pytest.importorskip("pygame")
    env = gym.make("PathTracking-v0", render_mode="rgb_array")
    env.reset(options={"state": SAFE_STATE["PathTracking-v0"]})
    first = env.render()
    assert first.dtype == np.uint8 and first.shape == (600, 900, 3)
    assert len(np.unique(first.reshape(-1, 3), axis=0)) > 10
    env.step(np.array([0.5, 0.3], dtype=np.float32))
    assert not np.array_equal(env.render(), first)
    env.close()


def test_vec_env_picture():
    pytest.importorskip("pygame")
    venv = PathTrackingVecEnv(6, render_mode="rgb_array")
    venv.seed(0)
    venv.reset()
    images = venv.get_images()
    assert len(images) == 4 and not np.array_equal(images[0], images[1])
    assert venv.render().shape == (1200, 1800, 3)
    venv.close()
    with pytest.raises(ValueError, match="rgb_array"):
        PathTrackingVecEnv(1).get_images()

    envs = gym.make_vec("PathTracking-v0", num_envs=2, render_mode="rgb_array")
    envs.reset(seed=0)
    frames = envs.render()
    assert len(frames) == 2 and frames[0].shape == (600, 900, 3)
    envs.close()


def test_window_opens_and_closes(monkeypatch):
    pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    env = PathTrackingEnv(render_mode="human")
    env.reset(seed=0)
    env.step(env.action_space.sample())
    env.close()
    env.close()


DRAW_PENDULUM = """
import gymnasium as gym, numpy as np, sb3_mpg_envs
env = gym.make("InvertedPendulumConti-v0", render_mode="rgb_array")
env.reset(options={"state": np.array([0.3, 0.15, 0.0, 0.0])})
image = env.render()
assert image.shape == (480, 720, 3) and image.dtype == np.uint8
assert len(np.unique(image.reshape(-1, 3), axis=0)) > 10
env.step(np.array([1.0], dtype=np.float32))
assert not np.array_equal(env.render(), image)
env.close()
"""


def run_with_backend(program: str, backend: str, monkeypatch) -> subprocess.CompletedProcess:
    # MuJoCo chooses its backend when it is imported
    monkeypatch.setenv("MUJOCO_GL", backend)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    return subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)


def test_pendulum_picture(monkeypatch):
    for backend in ("egl", "osmesa"):
        result = run_with_backend(DRAW_PENDULUM, backend, monkeypatch)
        if result.returncode == 0:
            return
        assert "AssertionError" not in result.stderr, result.stderr
    pytest.skip("MuJoCo can draw with neither EGL nor OSMesa on this machine")


def test_pendulum_window_needs_display(monkeypatch):
    if not sys.platform.startswith("linux"):
        pytest.skip("Only Linux runs without a display")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(RuntimeError, match="needs a display"):
        InvertedPendulumContiEnv(render_mode="human").reset()
