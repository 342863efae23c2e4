"""
A bound on the return of any policy from the starts of the evaluation, by trajectory optimisation on the true dynamics.

    python benchmarks/bound.py

The actions are those of a trained policy, which keeps unstable systems near their reference, plus an open-loop correction.
Adam optimises the correction of each step of the episode from several initial guesses. The return of a start is that of the
best guess, measured in the simulator. These are local optima: a better trajectory may exist.
Writes results/trust/bound-TASK.csv, with one row per start.
"""

import argparse

import gymnasium as gym
import numpy as np
import torch as th
from evaluation import START_SEED
from prior_models import MODELS
from settings import N_STARTS, TASKS
from tables import RESULTS, write_csv

from sb3_mpg import MPG

N_GUESSES = 2
FEEDBACK_STEPS = 2500


def train_feedback(task_name: str) -> th.nn.Module:
    """
    :param task_name: a key of ``TASKS``
    :return: a policy that keeps the system near its reference. It maps states to actions in double precision.
    """
    agent = MPG("MlpPolicy", TASKS[task_name].env_id, prior_model=MODELS[task_name]["exact"](), seed=START_SEED, device="cpu")
    agent.learn(FEEDBACK_STEPS, log_interval=10**9)
    return agent.actor.double().eval()


def optimise(task_name: str, iterations: int, learning_rate: float) -> np.ndarray:
    """
    :param task_name: a key of ``TASKS``
    :param iterations: number of optimizer steps
    :param learning_rate: initial learning rate of Adam; it decays to a hundredth
    :return: best return of each start, measured in the simulator, ``(N_STARTS,)``
    """
    task = TASKS[task_name]
    env = gym.make(task.env_id, early_reset=False)
    simulator = env.get_wrapper_attr("make_simulator")(N_STARTS * N_GUESSES)
    start_simulator = env.get_wrapper_attr("make_simulator")(N_STARTS)
    start_simulator.seed(START_SEED)
    start_simulator.reset()
    starts = np.tile(start_simulator.get_state(), (N_GUESSES, 1))
    model = MODELS[task_name]["exact"]().double()
    n_actions = env.action_space.shape[0]
    policy = train_feedback(task_name)
    th.manual_seed(0)
    guesses = 0.05 * th.randn(task.steps, N_STARTS * N_GUESSES, n_actions, dtype=th.float64)
    guesses[:, :N_STARTS] = 0.0
    inputs = guesses.requires_grad_()
    optimizer = th.optim.Adam([inputs], lr=learning_rate)
    schedule = th.optim.lr_scheduler.ExponentialLR(optimizer, 0.01 ** (1 / iterations))
    best = np.full(N_STARTS, -np.inf)
    for iteration in range(iterations + 1):
        states, total, actions_taken = th.as_tensor(starts), 0.0, []
        for step in range(task.steps):
            actions = th.clamp(policy(states) + inputs[step], -1.0, 1.0)
            next_states = model.transition(states, actions)
            total = total + model.reward(states, actions, next_states)
            states = next_states
            actions_taken.append(actions.detach().numpy())
        if iteration % 25 == 0 or iteration == iterations:
            simulator.set_state(starts)
            returns = sum(simulator.step(actions)[1] for actions in actions_taken).reshape(N_GUESSES, N_STARTS)
            best = np.maximum(best, returns.max(axis=0))
            print(
                task_name, iteration, f"mean of the best {best.mean():.5g}, of each guess {returns.mean(axis=1)}", flush=True
            )
        optimizer.zero_grad()
        (-total.sum()).backward()
        # Clip by value, because the starts are independent problems
        th.nn.utils.clip_grad_value_(inputs, 1.0)
        optimizer.step()
        schedule.step()
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    args = parser.parse_args()
    th.set_num_threads(1)
    for task in TASKS:
        if args.task in (None, task):
            returns = optimise(task, args.iterations, args.learning_rate)
            rows = [{"start": index, "return": f"{value:.6g}"} for index, value in enumerate(returns)]
            write_csv(RESULTS / "trust" / f"bound-{task}.csv", rows)
            print(f"{task}: mean {returns.mean():.5g}, median {np.median(returns):.5g} of {N_STARTS} starts")


if __name__ == "__main__":
    main()
