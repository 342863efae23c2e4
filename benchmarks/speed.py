"""
How fast an update is, on one thread, and on the GPU if there is one.

    taskset -c 0 python benchmarks/speed.py

Ratios compare measurements that alternate, so that other load on the machine affects both. Prints the table, writes it to
results/speed_DEVICE.csv, and writes the ten largest shares of an update to results/profile_DEVICE.csv.
"""

import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import gymnasium as gym
import numpy as np
import stable_baselines3
import torch as th
from settings import TASKS, make_model, make_vec_env
from stable_baselines3 import TD3
from tables import RESULTS, write_csv
from torch.profiler import ProfilerActivity, profile

from sb3_mpg import MPG
from sb3_mpg.common.buffers import RecordedSteps
from sb3_mpg.common.compilation.step_compiler import StepCompiler
from sb3_mpg.common.models.trainable import members_of
from sb3_mpg.common.precision import (
    DEFAULT,
    ONEDNN,
    choose_matmul_precision,
    factors_of_layers,
    is_as_exact,
    matmul_precision,
)
from sb3_mpg.common.rollouts.policy_gradient import mixed_policy_gradient
from sb3_mpg.common.rollouts.steps import EagerSteps, Steps
from sb3_mpg.common.torch_layers import ObservationScaler
from sb3_mpg.common.trust import MeasuredTrust
from sb3_mpg_envs.path_tracking.simulator import PathTrackingSimulator

BATCH, WIDTH, HORIZON = 256, 256, 25
REPEATS = 40
# Number of updates in one call of train()
UPDATES = 10
# The script starts itself with this argument
FIRST_UPDATE = "--first-update"


def take_turns(functions: dict[str, Callable[[], object]], device: str, repeats: int = REPEATS) -> dict[str, list[float]]:
    """
    :param functions: the measured functions, by name
    :param device: ``cpu`` or ``cuda``
    :param repeats: number of rounds; in each round every function runs once
    :return: wall-clock times of each function, in seconds, one per round
    """

    def seconds(function: Callable[[], object]) -> float:
        if device == "cuda":
            th.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device == "cuda":
            th.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(3):
        for function in functions.values():
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(seconds(function))
    return times


def fill(model: MPG | TD3, n: int = 3000) -> None:
    """
    :param model: algorithm whose replay buffer is filled with transitions of random actions
    :param n: number of environment steps
    """
    model.learning_starts = n + 10**6
    model.learn(n)
    model.learning_starts = 0
    model.set_logger(stable_baselines3.common.logger.configure(None, []))


def new_model(device: str) -> MPG:
    """
    :param device: ``cpu`` or ``cuda``
    :return: MPG-v2 with the papers' settings and a filled buffer
    """
    task = TASKS["path_tracking"]
    model = make_model("mpg_v2", task, make_vec_env(task, 16), 0, horizons=(0, HORIZON))
    fill(model)
    if device == "cpu":
        return model
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    loaded = MPG.load(file, env=model.get_env(), device=device)
    loaded.replay_buffer = model.replay_buffer
    loaded.replay_buffer.device = loaded.device  # type: ignore[union-attr]
    loaded.set_logger(model.logger)
    return loaded


def compiled_update(model: MPG, device: str) -> tuple[float, float]:
    """
    :param model: the algorithm; it compiles from now on
    :param device: ``cpu`` or ``cuda``
    :return: wall-clock time of its first update, and processor time including the C++ compiler, in seconds
    """
    model.update.steps = steps = StepCompiler()
    # The next update includes the policy
    model._n_updates = model.policy_delay - 1
    start, start_of_work = time.perf_counter(), sum(os.times()[:4])
    model.train(1, BATCH)
    if device == "cuda":
        th.cuda.synchronize()
    assert not steps.has_failed, "it could not be compiled"
    return time.perf_counter() - start, sum(os.times()[:4]) - start_of_work


def memory_ratio(model: MPG, observations: th.Tensor) -> float:
    """
    Peak memory of a policy gradient, relative to the least that it must store: for each model step the two hidden layers of
    the actor, its action before and after the squashing, and the state, control and reward of the model. The denominator does
    not contain the first action and the critic.

    :param model: the algorithm
    :param observations: raw observations, ``(B, O)``
    :return: the ratio
    """

    def gradient() -> None:
        mixed_policy_gradient(observations, model.update.context(model.units(), model.gamma), {HORIZON: 1.0})

    gradient()
    if observations.is_cuda:
        th.cuda.reset_peak_memory_stats()
        before = th.cuda.memory_allocated()
        gradient()
        peak = th.cuda.max_memory_allocated() - before
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            gradient()
        allocated = peak = 0
        for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                allocated += event.nbytes()
                peak = max(peak, allocated)
    numbers_per_step = 2 * WIDTH + 2 + 2 + 6 + 2 + 1
    return peak / (4 * BATCH * numbers_per_step * HORIZON)


def fp32_kernels(device: str) -> list[str]:
    """
    :param device: ``cpu`` or ``cuda``
    :return: settings of matrix products that have the rounding errors of single precision
    """
    if device == "cuda":
        return [DEFAULT]
    factors = factors_of_layers([th.randn(WIDTH, WIDTH)], BATCH)
    return [precision for precision in (DEFAULT, ONEDNN) if is_as_exact(factors, precision)]


class Table:
    """The rows of the table. Each is printed when it is added."""

    def __init__(self) -> None:
        self.rows: list[dict[str, str]] = []

    def add(self, what: str, values: list[float], unit: str = "", target: str = "", aim: str = "") -> None:
        """
        :param what: what was measured
        :param values: all measurements, or a single one
        :param unit: their unit
        :param target: upper limit, or lower limit of a rate
        :param aim: a better value, for later
        """
        low, high = (f"{q:.3g}" for q in statistics.quantiles(values, n=4)[::2]) if len(values) > 1 else ("", "")
        median = f"{statistics.median(values):.3g}"
        self.rows.append(
            {
                "what": what,
                "median": median,
                "first quartile": low,
                "third quartile": high,
                "unit": unit,
                "target": target,
                "aim": aim,
            }
        )
        print(f"{what:62} {median:>8} {unit:22} {low:>8} to {high:<8} target {target or '-':5} aim {aim or '-'}", flush=True)

    def add_ratio(self, what: str, times: list[float], reference: list[float], target: str = "", aim: str = "") -> None:
        """
        :param what: what was measured
        :param times: times of the numerator
        :param reference: times of the denominator, of the same rounds
        :param target: upper limit, or lower limit of a rate
        :param aim: a better value, for later
        """
        self.add(what, [time / other for time, other in zip(times, reference, strict=True)], "", target, aim)


def measure_first_update(table: Table, device: str) -> None:
    """
    Measure the first update in a new process without any cache of a compiler, and in one with the cache of the first.

    :param table: the rows are added to it
    :param device: ``cpu`` or ``cuda``
    """
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, FIRST_UPDATE, device]
        # The compiler also keeps headers, in the directory for temporary files
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TMPDIR": cache}
        outputs = [subprocess.run(command, env=environment, capture_output=True, check=True, text=True) for _ in range(2)]
    (cold, cold_work), (warm, warm_work) = ([float(word) for word in output.stdout.split()[-2:]] for output in outputs)
    table.add("first update after start, everything compiled", [cold], "s", "20", "5")
    table.add("... of which processor time", [cold_work], "s")
    table.add("... with a compiler cache on disk", [warm], "s")
    table.add("... of which processor time", [warm_work], "s")


def measure_gradient(table: Table, model: MPG, device: str) -> None:
    """
    :param table: the rows are added to it
    :param model: the algorithm
    :param device: ``cpu`` or ``cuda``
    """
    left, right = th.randn(BATCH, WIDTH, device=device), th.randn(WIDTH, WIDTH, device=device)
    kernels, precision = fp32_kernels(device), choose_matmul_precision(model.policy, BATCH)
    observations = model.replay_buffer.sample(BATCH).observations  # type: ignore[union-attr]
    units, compiler = model.units(), StepCompiler()

    def gradient(horizon: int, steps: Steps) -> Callable[[], object]:
        context = model.update.context(units, model.gamma)._replace(steps=steps)

        def run() -> None:
            # As `learn` does
            with matmul_precision(precision):
                mixed_policy_gradient(observations, context, {horizon: 1.0})

        return run

    def products(precision: str) -> Callable[[], object]:
        def run() -> None:
            # A gradient keeps all results, too
            with matmul_precision(precision):
                [left @ right for _ in range(2 * HORIZON)]

        return run

    times = take_turns(
        {
            **{precision: products(precision) for precision in kernels},
            "gradient": gradient(HORIZON, compiler),
            "gradient, not compiled": gradient(HORIZON, EagerSteps()),
            "5": gradient(5, compiler),
            "50": gradient(50, compiler),
        },
        device,
    )
    fastest = times[min(kernels, key=lambda precision: statistics.median(times[precision]))]
    table.add_ratio("policy gradient / its 50 hidden-layer products", times["gradient"], fastest, "2.0", "1.4")
    table.add_ratio("... not compiled", times["gradient, not compiled"], fastest)
    table.add_ratio("time at H = 50 / time at H = 5", times["50"], times["5"], "10", "9")
    for precision in kernels:
        library = {DEFAULT: "torch's default", ONEDNN: "oneDNN"}[precision]
        table.add(f"... 50 hidden-layer products, {library}", [1e3 * time for time in times[precision]], "ms")
    for name in ("gradient", "gradient, not compiled"):
        table.add(f"... {name}", [1e3 * time for time in times[name]], "ms")
    for name, steps in {"compiled": compiler, "not compiled": EagerSteps()}.items():
        model.update.steps = steps
        target, aim = ("2", "1.2") if steps is compiler else ("", "")
        table.add(
            f"memory of a policy gradient / its activations, {name}", [memory_ratio(model, observations)], "", target, aim
        )


def measure_update(table: Table, model: MPG, device: str) -> None:
    """
    :param table: the rows are added to it
    :param model: the algorithm
    :param device: ``cpu`` or ``cuda``
    """
    task = TASKS["path_tracking"]
    td3 = TD3(
        "MlpPolicy",
        make_vec_env(task, 16),
        buffer_size=500_000,
        # The observations are scaled as for MPG. With raw observations ELU saturates so far that denormal numbers occur,
        # which take three times as long on some processors
        policy_kwargs={
            "net_arch": [WIDTH, WIDTH],
            "activation_fn": th.nn.ELU,
            "features_extractor_class": ObservationScaler,
            "features_extractor_kwargs": {"scale": list(task.observation_scale)},
        },
        device=device,
    )
    fill(td3)
    compiler = StepCompiler()
    precision = choose_matmul_precision(model.policy, BATCH)

    def train(steps: Steps) -> None:
        model.update.steps = steps
        # As `learn` does
        with matmul_precision(precision):
            model.train(UPDATES, BATCH)

    times = take_turns(
        {
            "TD3": lambda: td3.train(UPDATES, BATCH),
            "MPG-v2": lambda: train(compiler),
            "MPG-v2, not compiled": lambda: train(EagerSteps()),
        },
        device,
        repeats=REPEATS // 2,
    )
    table.add_ratio("MPG-v2 update / TD3 update (SB3)", times["MPG-v2"], times["TD3"], "2.5", "1.5")
    table.add_ratio("... not compiled", times["MPG-v2, not compiled"], times["TD3"])
    for name, values in times.items():
        target = "1.5" if device == "cuda" and name == "MPG-v2" else ""
        table.add(f"... {name}", [1e3 * time / UPDATES for time in values], "ms", target)
    model.update.steps = compiler


def measure_default(table: Table, device: str) -> None:
    """
    Measure the time that the correction of the model and the measurement of errors add to an update of the defaults.

    :param table: the rows are added to it
    :param device: ``cpu`` or ``cuda``
    """
    model = MPG("MlpPolicy", make_vec_env(TASKS["path_tracking"], 16), seed=0, device=device)
    fill(model)
    model.update.steps = StepCompiler()
    units, update, fitting, trust = model.units(), model.update, model.model_fitting, model.trust
    assert fitting is not None and isinstance(trust, MeasuredTrust)
    recorded = RecordedSteps(model.replay_buffer, units.unscale_actions, model.device)
    context, exploration = update.context(units, model.gamma), model.update_settings(1).exploration
    q_functions = update.q_functions(fitting.model.n_members)
    observations = model.replay_buffer.sample(BATCH).observations  # type: ignore[union-attr]

    def explore() -> None:
        for _ in range(UPDATES):
            with members_of(fitting.model, "dealt"):
                exploration.perturb(observations, context, trust=1.0)

    def fit() -> None:
        for _ in range(UPDATES):
            fitting.fit(1, recorded)

    def measure() -> None:
        # The first measurement is due at once
        trust.measurements = []
        with members_of(fitting.model, "dealt"):
            trust.measure(1, context, q_functions, fitting, recorded)

    times = take_turns(
        {
            "update": lambda: model.train(2 * trust.every, BATCH),
            "fit": fit,
            "measurement": measure,
            "exploring": explore,
        },
        device,
        repeats=REPEATS // 2,
    )
    updates = [time / (2 * trust.every) for time in times["update"]]
    fits = [time / UPDATES for time in times["fit"]]
    measurements = [time / trust.every for time in times["measurement"]]
    # Only in updates of the policy
    explorations = [time / UPDATES / model.policy_delay for time in times["exploring"]]
    added = [fitting + measuring for fitting, measuring in zip(fits, measurements, strict=True)]
    rest = [update - both - exploring for update, both, exploring in zip(updates, added, explorations, strict=True)]
    table.add_ratio("default settings: fitting and measuring / rest of an update", added, rest, "0.25")
    parts = {"update": updates, "fitting": fits, "measuring": measurements, "exploring in the model": explorations}
    for name, values in parts.items():
        table.add(f"... {name}", [1e3 * time for time in values], "ms")


def measure_simulator(table: Table) -> None:
    """
    :param table: the rows are added to it
    """
    task, n_agents = TASKS["path_tracking"], 512
    v1 = make_model("mpg_v1", task, make_vec_env(task, 16), 0)
    fill(v1)
    precision = choose_matmul_precision(v1.policy, BATCH)
    data, inputs = v1.replay_buffer.sample(BATCH), v1.training_inputs(BATCH)
    actions = np.random.default_rng(0).uniform(-0.1, 0.1, (n_agents, 2))

    def target(steps: Steps) -> Callable[[], object]:
        targets = v1.update.targets(v1.update_settings(1))
        context = v1.update.context(inputs.units, v1.gamma)._replace(steps=steps)

        def run() -> None:
            v1.value_target(data, context, targets, v1.update.simulator)
            assert steps.is_compiled or isinstance(steps, EagerSteps), "it could not be compiled"

        return run

    def step(compile: bool) -> Callable[[], object]:
        simulator: PathTrackingSimulator = gym.make(task.env_id, compile=compile).get_wrapper_attr("make_simulator")(n_agents)
        simulator.seed(0)
        simulator.reset()
        return lambda: simulator.step(actions)

    # These are no ratios, so nothing alternates
    for what, steps in {"compiled": StepCompiler(), "not compiled": EagerSteps()}.items():
        with th.no_grad(), matmul_precision(precision):
            times = take_turns({"target": target(steps)}, "cpu")["target"]
        goals = ("20", "5") if what == "compiled" else ("", "")
        table.add(f"n-step target of MPG-v1, 256 states, 25 steps, {what}", [1e3 * time for time in times], "ms", *goals)
    for what in ("compiled", "not compiled"):
        times = take_turns({"step": step(what == "compiled")}, "cpu", repeats=500)["step"]
        rates = [n_agents / time / 1e6 for time in times]
        goals = ("1", "3") if what == "compiled" else ("", "")
        table.add(f"path-tracking simulator, 512 agents, one core, {what}", rates, "million agent-steps/s", *goals)


def write_profile(model: MPG, device: str) -> None:
    """
    :param model: the algorithm
    :param device: ``cpu`` or ``cuda``
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as profiler:
        model.train(2 * UPDATES, BATCH)
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    rows = [
        {
            "what": event.key[:60],
            "share of an update": f"{event.self_cpu_time_total / total:.1%}",
            "calls in an update": event.count / (2 * UPDATES),
        }
        for event in events[:10]
    ]
    write_csv(RESULTS / f"profile_{device}.csv", rows)


def main() -> None:
    th.set_num_threads(1)
    if FIRST_UPDATE in sys.argv:
        print(*compiled_update(new_model(sys.argv[-1]), sys.argv[-1]))
        return
    device = "cuda" if th.cuda.is_available() else "cpu"
    load = f"{os.getloadavg()[0]:.1f}"
    table = Table()
    measure_first_update(table, device)
    if device == "cpu":
        # First, with nothing else in memory, as in a training
        measure_simulator(table)
    model = new_model(device)
    measure_gradient(table, model, device)
    measure_update(table, model, device)
    measure_default(table, device)

    machine = {"gpu": th.cuda.get_device_name() if device == "cuda" else "", "load before": load}
    write_csv(RESULTS / f"speed_{device}.csv", [{**row, **machine} for row in table.rows])
    write_profile(model, device)


if __name__ == "__main__":
    main()
