"""
How fast learned dynamics are, on one thread: a step of their optimizer, and a policy gradient through a short rollout, each
beside its matrix products alone.

    taskset -c 0 python benchmarks/learned_speed.py

Measurements alternate, so that other load on the machine affects both. Prints the table, and writes it to
results/learned_speed_cpu.csv.
"""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch as th
from gymnasium import spaces
from speed import take_turns
from tables import RESULTS, print_table, write_csv

from sb3_mpg import MPG, DynamicsModel
from sb3_mpg.common.compilation.step_compiler import StepCompiler
from sb3_mpg.common.models.trainable import members_of
from sb3_mpg.common.models.windows import Transitions
from sb3_mpg.common.rollouts.policy_gradient import mixed_policy_gradient
from sb3_mpg.common.rollouts.steps import EagerSteps

ENV_ID = "Hopper-v5"
BATCH, HORIZON, N_MEMBERS, NET_ARCH = 256, 3, 5, (200, 200)

#: Input and weight of a matrix product
Product = tuple[th.Tensor, th.Tensor]


def products_of(
    sizes: Sequence[int], n_rows: int, n_members: int, with_weights: bool, with_inputs: bool = True
) -> list[Product]:
    """
    :param sizes: numbers of inputs, hidden units and outputs of networks
    :param n_rows: number of rows of each network
    :param n_members: number of networks
    :param with_weights: whether the weights have a gradient
    :param with_inputs: whether the inputs of the first layer have one
    :return: the matrix products of the forward and the backward pass
    """
    products = []
    for layer, (n_in, n_out) in enumerate(pairwise(sizes)):
        inputs, weight, gradient = (th.randn(n_members, *shape) for shape in ((n_rows, n_in), (n_in, n_out), (n_rows, n_out)))
        products.append((inputs, weight))
        if with_weights:
            products.append((inputs.transpose(1, 2), gradient))
        if with_inputs or layer > 0:
            products.append((gradient, weight.transpose(1, 2)))
    return products


def multiply(products: Sequence[Product]) -> None:
    """
    :param products: matrix products to compute
    """
    for left, right in products:
        th.bmm(left, right)


def main() -> None:
    th.set_num_threads(1)
    model = MPG(
        "MlpPolicy",
        ENV_ID,
        prior_model="learned",
        prior_model_kwargs={"n_members": N_MEMBERS, "net_arch": NET_ARCH},
        horizons=(0, HORIZON),
        learning_starts=1000,
        seed=0,
        device="cpu",
    ).learn(1000)
    dynamics, units = model.rollout_model, model.units()
    assert isinstance(dynamics, DynamicsModel)
    (n_states,), (n_actions,) = model.observation_space.shape, model.action_space.shape
    n_rows = N_MEMBERS * BATCH
    data = model.replay_buffer.sample(n_rows)
    actions = units.unscale_actions(data.actions)
    recorded = data.observations, actions, data.rewards, data.next_observations, data.dones
    transitions = Transitions(*(tensor.float() for tensor in recorded))
    dynamics.rescale(transitions)
    box = spaces.Box(-1, 1, (n_states,)), spaces.Box(-1, 1, (n_actions,))
    deterministic = DynamicsModel(*box, distribution="deterministic", n_members=N_MEMBERS, net_arch=NET_ARCH)
    deterministic.rescale(transitions)

    n_inputs, n_targets = n_states + n_actions, n_states + 1
    functions: dict[str, Callable[[], object]] = {
        "fit, Gaussian": lambda: dynamics.fit(transitions),
        "fit, deterministic": lambda: deterministic.fit(transitions),
    }
    products = {
        f"fit, {name}": products_of((n_inputs, *NET_ARCH, n_outputs), BATCH, N_MEMBERS, True, False)
        for name, n_outputs in (("Gaussian", 2 * n_targets), ("deterministic", n_targets))
    }
    # The policy gradient: the policy in each state, its weights in the first; the model in each step; the critic at the end
    observations = transitions.observations[:BATCH]
    width = model.actor.mu[0].in_features
    policy = (width, *(layer.out_features for layer in model.actor.mu if isinstance(layer, th.nn.Linear)))
    critic = (width + n_actions, *policy[1:-1], 1)
    rollout = products_of(policy, BATCH, 1, True, False) + products_of(critic, BATCH, 1, False)
    for _ in range(HORIZON):
        rollout += products_of((n_inputs, *NET_ARCH, 2 * n_targets), -(-BATCH // N_MEMBERS), N_MEMBERS, False)
        rollout += products_of(policy, BATCH, 1, False)
    context = model.update.context(units, model.gamma)
    for name, steps in (("eager", EagerSteps()), ("compiled", StepCompiler(n_rows=BATCH))):
        name = f"policy gradient through {HORIZON} steps, {name}"
        functions[name] = partial(mixed_policy_gradient, observations, context._replace(steps=steps), {HORIZON: 1.0})
        products[name] = rollout
    alone = {f"{name}: products": partial(multiply, of) for name, of in products.items()}
    with members_of(dynamics, "dealt"):
        times = take_turns({**functions, **alone}, "cpu")
    rows = []
    for name in functions:
        measured, bound = (statistics.median(times[key]) for key in (name, f"{name}: products"))
        rows.append(
            {
                "what": name,
                "milliseconds": f"{1e3 * measured:.2f}",
                "matrix products alone": f"{1e3 * bound:.2f}",
                "ratio": f"{measured / bound:.2f}",
            }
        )
    print_table(rows)
    write_csv(RESULTS / "learned_speed_cpu.csv", rows)


if __name__ == "__main__":
    main()
