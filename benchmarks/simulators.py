"""
How fast the environments are, on one core.

    python benchmarks/simulators.py

Writes results/simulators.csv. Rates are per second of processor time, which other programs disturb less than wall-clock time.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable

# Before NumPy is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gymnasium as gym
import mujoco
import numpy as np
from tables import RESULTS, write_csv

import sb3_mpg_envs  # noqa: F401
from sb3_mpg_envs.inverted_pendulum import InvertedPendulumContiVecEnv
from sb3_mpg_envs.path_tracking import PathTrackingVecEnv

NUM_AGENTS = 512
N_REPEATS = 7
SECONDS_PER_REPEAT = 0.7
TASKS = {"PathTracking-v0": PathTrackingVecEnv, "InvertedPendulumConti-v0": InvertedPendulumContiVecEnv}


def use_one_core() -> None:
    """Pin this process to a core, if the operating system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def steps_per_second(step: Callable[[], object], steps_per_call: int) -> tuple[float, float]:
    """
    :param step: the timed function
    :param steps_per_call: number of agents that it steps
    :return: best and median of the repeats, in agent-steps per second of processor time
    """
    step()
    rates = []
    for _ in range(N_REPEATS):
        n_calls, start = 0, time.process_time()
        while (elapsed := time.process_time() - start) < SECONDS_PER_REPEAT:
            step()
            n_calls += 1
        rates.append(n_calls * steps_per_call / elapsed)
    return max(rates), statistics.median(rates)


def time_task(env_id: str) -> dict[str, tuple[float, float]]:
    """
    :param env_id: id of the environment
    :return: best and median rate of each interface
    """
    rng = np.random.default_rng(0)
    # Small actions and centred starts give few early resets, as a trained policy does
    venv = TASKS[env_id](NUM_AGENTS, start_width=0.5)
    venv.seed(0)
    venv.reset()
    space = venv.simulator.action_space
    actions = 0.05 * rng.uniform(space.low, space.high, (NUM_AGENTS, *space.shape))

    simulator = venv.simulator.make_simulator(NUM_AGENTS)
    simulator.seed(0)
    simulator.reset()

    env = gym.make(env_id, start_width=0.5)
    env.reset(seed=0)

    def step_env() -> None:
        _, _, terminated, truncated, _ = env.step(actions[0])
        if terminated or truncated:
            env.reset()

    return {
        "simulator": steps_per_second(lambda: simulator.step(actions), NUM_AGENTS),
        "Stable-Baselines3 VecEnv": steps_per_second(lambda: venv.step(actions), NUM_AGENTS),
        "gymnasium.make": steps_per_second(step_env, 1),
    }


def main() -> None:
    """Time all interfaces and write the table."""
    use_one_core()
    versions = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "mujoco": mujoco.__version__,
    }
    rows: list[dict[str, object]] = []
    for env_id in TASKS:
        for interface, (best, median) in time_task(env_id).items():
            n_agents = 1 if interface == "gymnasium.make" else NUM_AGENTS
            print(f"{env_id:26} {interface:26} {n_agents:4} agents: best {best:12,.0f}, median {median:12,.0f} agent-steps/s")
            result = {
                "env": env_id,
                "interface": interface,
                "n_agents": n_agents,
                "best": round(best),
                "median": round(median),
            }
            rows.append({**result, **versions})
    write_csv(RESULTS / "simulators.csv", rows)


if __name__ == "__main__":
    main()
