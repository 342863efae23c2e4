"""
How fast an update is, as ratios inside one run, on one thread (and on the GPU where there is one).

    taskset -c 0 python benchmarks/speed.py

Prints the table and writes it to results/speed_DEVICE.csv, and the ten largest shares of an update to
results/profile_DEVICE.csv.
"""

import csv
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np
import stable_baselines3
import torch as th
from settings import TASKS, make_model, make_vec_env
from stable_baselines3 import TD3
from torch.profiler import ProfilerActivity, profile

from sb3_mpg import MPG
from sb3_mpg.common.model_rollout import StepCompiler

RESULTS = Path(__file__).parent / "results"
BATCH, WIDTH, HORIZON = 256, 256, 25
REPEATS = 40


def cpu_name() -> str:
    """
    :return: name of the processor
    """
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def seconds(function: Callable[[], object], device: str, repeats: int = REPEATS) -> list[float]:
    """
    :param function: what to measure
    :param device: where it runs
    :param repeats: number of measurements
    :return: wall-clock times, in seconds
    """

    def synchronize() -> None:
        if device == "cuda":
            th.cuda.synchronize()

    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        times.append(time.perf_counter() - start)
    return times


def fill(model: MPG | TD3, n: int = 3000) -> None:
    """
    :param model: whose replay buffer gets transitions, of random actions
    :param n: number of environment steps
    """
    model.learning_starts = n + 10**6
    model.learn(n)
    model.learning_starts = 0
    model.set_logger(stable_baselines3.common.logger.configure(None, []))


def new_model(device: str, horizon: int = HORIZON, **kwargs: object) -> MPG:
    """
    :param device: where it runs
    :param horizon: number of model steps
    :return: MPG-v2 with the papers' settings and a filled buffer
    """
    task = TASKS["path_tracking"]
    model = make_model("mpg_v2", task, make_vec_env(task, 16), 0, horizons=(0, horizon), **kwargs)
    fill(model)
    if device != "cpu":
        model.save("/dev/shm/speed.zip")
        loaded = MPG.load("/dev/shm/speed.zip", env=model.get_env(), device=device)
        loaded.replay_buffer = model.replay_buffer
        loaded.replay_buffer.device = loaded.device  # type: ignore[union-attr]
        loaded.set_logger(model.logger)
        return loaded
    return model


def memory_ratio(model: MPG, observations: th.Tensor) -> float:
    """
    Peak of what a policy gradient allocates over what its stored activations need: for each of the actor's evaluations
    the outputs of its layers, for each step of the model its states, actions and rewards.

    :param model: the algorithm
    :param observations: raw observations, ``(B, O)``
    :return: the ratio
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model._mixed_policy_gradient(observations, model._units(), {HORIZON: 1.0})
    allocated = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    numbers_per_step = 2 * WIDTH + 2 + 6 + 2 + 1
    return peak / (4 * BATCH * numbers_per_step * HORIZON)


def measure(device: str) -> tuple[list[dict[str, str]], MPG]:
    """
    :param device: ``"cpu"`` or ``"cuda"``
    :return: the rows of the table, and the algorithm with everything compiled
    """
    rows: list[dict[str, str]] = []

    def row(what: str, value: float, spread: float, unit: str, must: str, aim: str) -> None:
        rows.append(
            {
                "what": what,
                "median": f"{value:.3g}",
                "spread": f"{spread:.2g}",
                "unit": unit,
                "must reach": must,
                "aim for": aim,
            }
        )
        print(rows[-1], flush=True)

    def time_row(what: str, times: list[float]) -> float:
        median = statistics.median(times)
        quartiles = statistics.quantiles(times, n=4)
        row(what, 1e3 * median, 1e3 * (quartiles[2] - quartiles[0]), "ms", "", "")
        return median

    left, right = th.randn(BATCH, WIDTH, device=device), th.randn(WIDTH, WIDTH, device=device)
    products = time_row("50 hidden-layer products, fp32", seconds(lambda: [left @ right for _ in range(2 * HORIZON)], device))

    def gradient_times(model: MPG, horizon: int) -> list[float]:
        observations = model.replay_buffer.sample(BATCH).observations  # type: ignore[union-attr]
        units, weights = model._units(), {horizon: 1.0}
        return seconds(lambda: model._mixed_policy_gradient(observations, units, weights), device)

    model = new_model(device)
    eager = time_row("policy gradient, H = 25, not compiled", gradient_times(model, HORIZON))
    model._step_compiler = StepCompiler()
    start = time.perf_counter()
    model._n_updates = 1
    model.train(1, BATCH)
    if device == "cuda":
        th.cuda.synchronize()
    row("first update after start, everything compiled", time.perf_counter() - start, 0.0, "s", "20", "5")
    compiled = time_row("policy gradient, H = 25, compiled", gradient_times(model, HORIZON))
    row("policy gradient / its 50 hidden-layer products", compiled / products, 0.0, "", "2.0", "1.4")
    row("... not compiled", eager / products, 0.0, "", "", "")
    by_horizon = {horizon: statistics.median(gradient_times(model, horizon)) for horizon in (5, 50)}
    row("time at H = 50 / time at H = 5", by_horizon[50] / by_horizon[5], 0.0, "", "10", "9")

    task = TASKS["path_tracking"]
    td3 = TD3(
        "MlpPolicy",
        make_vec_env(task, 16),
        buffer_size=500_000,
        policy_kwargs={"net_arch": [WIDTH, WIDTH], "activation_fn": th.nn.ELU},
        device=device,
    )
    fill(td3)
    td3_update = time_row("TD3 update (SB3)", [t / 10 for t in seconds(lambda: td3.train(10, BATCH), device)])
    mpg_update = time_row("MPG-v2 update, compiled", [t / 10 for t in seconds(lambda: model.train(10, BATCH), device)])
    row("MPG-v2 update / TD3 update", mpg_update / td3_update, 0.0, "", "2.5", "1.5")
    model._step_compiler, compiler = None, model._step_compiler
    plain = time_row("MPG-v2 update, not compiled", [t / 10 for t in seconds(lambda: model.train(10, BATCH), device, 10)])
    row("... not compiled / TD3 update", plain / td3_update, 0.0, "", "", "")
    if device == "cpu":
        memory = memory_ratio(model, model._batches[0].observations)
        row("memory of a policy gradient / its activations", memory, 0.0, "", "2", "1.2")
    model._step_compiler = compiler

    v1 = make_model("mpg_v1", task, make_vec_env(task, 16), 0)
    fill(v1)
    data, units = v1.replay_buffer.sample(BATCH), v1._units()  # type: ignore[union-attr]
    arguments = (data, v1.actor, v1.actor_target, v1.critic_target, units, v1.gamma, v1._make_simulator)
    with th.no_grad():
        target_times = seconds(lambda: v1.value_target(*arguments), "cpu")
    row("n-step target of MPG-v1, 256 states, 25 steps", 1e3 * statistics.median(target_times), 0.0, "ms", "20", "5")

    simulator = gym.make(task.env_id).get_wrapper_attr("make_simulator")(512)
    simulator.seed(0)
    simulator.reset()
    actions = np.random.default_rng(0).uniform(-1, 1, (512, 2))
    simulator.set_state(simulator.reset())
    steps = statistics.median(seconds(lambda: simulator.step(0.1 * actions), "cpu", 300))
    row("path-tracking simulator, 512 agents, one core", 512 / steps / 1e6, 0.0, "million agent-steps/s", "1", "3")
    return rows, model


def write_profile(model: MPG, device: str) -> None:
    """
    :param model: the algorithm
    :param device: where it runs
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as profiler:
        model.train(20, BATCH)
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    with (RESULTS / f"profile_{device}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["what", "share of an update", "calls in an update"])
        for event in events[:10]:
            writer.writerow([event.key[:60], f"{event.self_cpu_time_total / total:.1%}", event.count / 20])


def main() -> None:
    th.set_num_threads(1)
    device = "cuda" if th.cuda.is_available() else "cpu"
    rows, model = measure(device)
    versions = f"torch {th.__version__}, stable-baselines3 {stable_baselines3.__version__}, numpy {np.__version__}"
    machine = cpu_name() + (f", {th.cuda.get_device_name()}" if device == "cuda" else "")
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"speed_{device}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "versions", "machine"])
        writer.writeheader()
        writer.writerows({**row, "versions": versions, "machine": machine} for row in rows)
    write_profile(model, device)


if __name__ == "__main__":
    main()
