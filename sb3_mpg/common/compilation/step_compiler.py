"""Compiles model and policy for rollouts. The results are the same up to rounding errors."""

import logging
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch as th

from sb3_mpg.common.compilation.beside import CompilerProcess
from sb3_mpg.common.compilation.blocks import Blocks
from sb3_mpg.common.compilation.compiled_loop import Carried, CompiledLoop
from sb3_mpg.common.compilation.torch_compile import compile_function, compile_loop, compiling, in_a_line
from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.loading import name_of
from sb3_mpg.common.rollouts.steps import (
    EagerSteps,
    HeldState,
    PlannedState,
    RolloutContext,
    RolloutState,
    Steps,
    advance,
    hold,
    with_offsets,
)
from sb3_mpg.common.type_aliases import Policy
from sb3_mpg.common.units import Units

Result = TypeVar("Result")

logger = logging.getLogger(__name__)

# Compiled steps save 2 to 3 milliseconds for each model step of a batch (benchmarks/speed.py). Compiling takes 30 seconds, in
# this process on a GPU, and otherwise beside eager updates
COMPILE_FROM_MODEL_STEPS = 7500
# Number of eager updates before each kind of steps is compiled. They are compiled in this order, on two cores by about this
# time. Plans come first, because they take most of the time of eager updates. With more eager updates nobody would wait for
# the compiler, but a training whose steps are in its cache, or on one core, would take longer
N_EAGER_UPDATES = {"follow": 40, "advance": 100, "hold": 200}
AT_ONCE, NEVER = -float("inf"), float("inf")


def check_compile(choice: Any) -> None:
    """
    :param choice: whether rollouts are compiled
    :raises ValueError: when it is not one of ``True``, ``False`` and ``"auto"``
    """
    if choice not in (True, False, "auto"):
        raise ValueError(f"`compile` must be True, False or 'auto', got {choice!r}.")


def choose_to_compile(choice: bool | Literal["auto"], n_model_steps: float, n_updates: int, device: th.device) -> float:
    """
    :param choice: whether rollouts are compiled; ``"auto"`` compiles if that repays the compile time
    :param n_model_steps: number of model steps that are to be taken
    :param n_updates: number of updates so far
    :param device: device of the rollouts
    :return: number of updates after which steps are compiled beside the training, ``AT_ONCE`` or ``NEVER``
    """
    if choice == "auto":
        beside = AT_ONCE if device.type == "cuda" else n_updates
        return beside if n_model_steps >= COMPILE_FROM_MODEL_STEPS else NEVER
    return AT_ONCE if choice else NEVER


def with_gradient(tensor: th.Tensor) -> th.Tensor:
    """
    :param tensor: a tensor
    :return: the same, or a leaf with its values that requires a gradient
    """
    return tensor if tensor.requires_grad else tensor.detach().requires_grad_()


def like_a_middle(rollout: RolloutState, model: PriorModel) -> RolloutState:
    """
    :param rollout: state of a rollout
    :param model: the model
    :return: the same, where all that changes requires a gradient: states, network inputs and actions, and the survival if the
        model may terminate. They do so in the middle of a rollout; without this, its first step would be compiled separately
    """
    changing = {name: with_gradient(getattr(rollout, name)) for name in ("states", "network_inputs", "actions")}
    if model.may_terminate:
        changing["alive"] = with_gradient(rollout.alive)
    return rollout._replace(**changing)


def act(network_inputs: th.Tensor, actor: th.nn.Module) -> th.Tensor:
    """
    :param network_inputs: normalised observations, ``(B, O)``
    :param actor: the policy
    :return: its actions, in [-1, 1], ``(B, A)``
    """
    return actor(network_inputs)


def step(
    rollout: RolloutState, actor: th.nn.Module, actor_parameters: dict[str, th.Tensor], model: PriorModel, units: Units
) -> tuple[RolloutState, th.Tensor]:
    """
    :return: the rollout after one step of :func:`advance`, and the reward of this step, ``(1, B, 1)``
    """
    rollout, rewards = advance(rollout, 1, actor, actor_parameters, model, units, gamma=1.0)
    # The next step needs contiguous tensors that are not views of each other
    states, actions, network_inputs = rollout.states.contiguous(), rollout.actions.contiguous(), rollout.network_inputs
    network_inputs = states if network_inputs is rollout.states else network_inputs.clone(memory_format=th.contiguous_format)
    # Not `_replace`, which torch 2.8 cannot compile
    return RolloutState(states, network_inputs, actions, rollout.alive, rollout.start), th.stack([rewards])


def held_step(
    held: HeldState, env_actions: th.Tensor, model: PriorModel, low: th.Tensor, high: th.Tensor
) -> tuple[HeldState, th.Tensor]:
    """
    :return: state after one step of :func:`hold`, and whether each row took it, bool ``(1, B, 1)``
    """
    held, is_taken = hold(held, 1, env_actions, model, low, high)
    # The next step needs contiguous tensors
    return HeldState(*(tensor.contiguous() for tensor in held)), is_taken


def planned_step(
    planned: PlannedState, actor: th.nn.Module, actor_parameters: dict[str, th.Tensor], model: PriorModel, units: Units
) -> tuple[PlannedState, th.Tensor]:
    """
    :return: the rollout after one step of its plan, and the reward of this step, ``(1, B, 1)``
    """
    rollout, offsets = with_offsets(planned)
    rollout, rewards = step(rollout, actor, actor_parameters, model, units)
    return PlannedState(*rollout, offsets.contiguous()), rewards


@lru_cache(maxsize=64)
def discounts_of(gamma: float, n_steps: int, device: th.device) -> th.Tensor:
    """
    :param gamma: discount factor
    :param n_steps: number of steps
    :param device: device of the result
    :return: the discounts of these steps, ``(n_steps, 1, 1)``; a cached tensor, which must not be changed
    """
    return th.tensor([gamma**index for index in range(n_steps)], device=device).reshape(-1, 1, 1)


class StepCompiler(Steps):
    """
    Compiles the steps of rollouts, those that perturb start states, those of plans, and the policy. If something cannot be
    compiled, all steps are eager from then on, with one warning. Copies and pickles compile again.

    :param backend: backend of ``torch.compile``
    :param n_rows: number of rows that steps are compiled for; other batches are taken in blocks of so many rows. A model that
        draws noise draws it block by block then, other than without compilation. ``None`` compiles again for each size
    :param after_update: number of updates after which another process compiles. After ``N_EAGER_UPDATES`` more, steps are
        compiled. The numbers are fixed, so that two runs with the same seed are the same. ``AT_ONCE`` compiles in this process
    :param asks: whether to ask another process to compile
    """

    def __init__(self, backend: str = "inductor", n_rows: int | None = None, after_update: float = AT_ONCE, asks: bool = True):
        self.backend = backend
        self.n_rows = n_rows
        self.after_update = after_update
        self.asks = asks
        self.n_updates = 0
        #: Whether something could not be compiled; all steps are eager from then on
        self.has_failed = False
        self._eager = EagerSteps()
        # Compiled at the first call, where failures are handled
        self._step_loop: CompiledLoop | None = None
        self._hold_loop: CompiledLoop | None = None
        self._plan_loop: CompiledLoop | None = None
        self._act: Callable[..., th.Tensor] | None = None
        # Compiles beside the training, and for each kind of steps the file that says that they are compiled
        self._beside: CompilerProcess | None = None
        self._requests: dict[str, Path | None] = {}

    def __reduce__(self) -> tuple[type["StepCompiler"], tuple[str, int | None, float, bool]]:
        # Compiled functions cannot be pickled or shared. A copy, as that of a learner, finds what the original asked for
        return StepCompiler, (self.backend, self.n_rows, self.after_update, False)

    @property
    def is_compiled(self) -> bool:  # type: ignore[override]
        return not self.has_failed and self._is_due("advance")

    def _is_due(self, method: str) -> bool:
        return self.n_updates > self.after_update + N_EAGER_UPDATES[method]

    def begin_update(self, n_updates: int) -> None:
        self.n_updates = n_updates

    def close(self) -> None:
        if self._beside is not None:
            self._beside.close()
        self._beside, self._requests = None, {}

    def _compile_beside(self, method: str, args: tuple[Any, ...]) -> None:
        """
        Have steps compiled in another process. Without one they are compiled here, later.

        :param method: name of the method that takes the steps
        :param args: its arguments
        """
        if method in self._requests or not self.asks:
            return
        try:
            self._beside = self._beside or CompilerProcess()
            rank = list(N_EAGER_UPDATES).index(method)
            self._requests[method] = self._beside.request(StepCompiler(self.backend, self.n_rows), method, args, rank)
        except Exception as error:
            logger.debug("Steps are not compiled in another process: %s: %s", type(error).__name__, error)
            self._requests[method] = None

    def _wait_for(self, method: str) -> None:
        done = self._requests.pop(method, None)
        if done is not None and self._beside is not None:
            self._beside.wait(done)
            # The process has hundreds of megabytes
            if not self._requests and all(map(self._is_due, N_EAGER_UPDATES)):
                self.close()

    def _attempt(
        self,
        method: str,
        what: str,
        compiled: Callable[..., Result],
        eager: Callable[..., Result],
        args: tuple[Any, ...],
    ) -> Result:
        """
        Run a function compiled, or eagerly before the first update with compiled steps and after a failure of the compiler.

        :param method: name of the method of this class
        :param what: name of the function, for a warning
        :param compiled: compiles and runs the function
        :param eager: runs the function without compilation
        :param args: arguments of both
        :return: the result
        """
        if self.has_failed:
            return eager(*args)
        if not self._is_due(method):
            self._compile_beside(method, args)
            return eager(*args)
        self._wait_for(method)
        try:
            with compiling():
                return compiled(*args)
        except Exception as error:
            # Continue training after any failure of the compiler. An error of the model itself is raised again here
            self.has_failed = True
            result = eager(*args)
            warnings.warn(
                f"{what} could not be compiled and run as they are, more slowly ({in_a_line(error)}). `compile=False` avoids "
                "the attempt."
            )
            return result

    def _in_blocks(
        self, carried: Carried, n_steps: int, take: Callable[[Carried], tuple[Carried, th.Tensor]], context: RolloutContext
    ) -> tuple[Carried, th.Tensor]:
        """
        :param carried: state of a rollout, a named tuple of batches
        :param n_steps: number of steps
        :param take: takes them with a block; returns its state, and the reward of each step, ``(n_steps, B, 1)``
        :param context: model and discount factor
        :return: state after these steps, and the sum of their discounted rewards, ``(B, 1)``
        """
        kind, rows = type(carried), carried[0]
        # On a GPU many rows take hardly longer than a few
        blocks = Blocks.of(len(rows), context.model, self.n_rows if rows.device.type == "cpu" else None)
        results = [take(kind(*block)) for block in zip(*map(blocks.split, carried), strict=True)]
        after, rewards = zip(*results, strict=True)
        joined = blocks.join(rewards, dim=1)
        total = (discounts_of(context.gamma, n_steps, joined.device) * joined).sum(dim=0)
        return kind(*map(blocks.join, zip(*after, strict=True))), total

    def advance(
        self, rollout: RolloutState, n_steps: int, actor_parameters: dict[str, th.Tensor], context: RolloutContext
    ) -> tuple[RolloutState, th.Tensor]:
        args = (rollout, n_steps, actor_parameters, context)
        what = f"{name_of(context.model)} and the policy"
        return self._attempt("advance", what, self._advance, self._eager.advance, args)

    def _advance(
        self, rollout: RolloutState, n_steps: int, actor_parameters: dict[str, th.Tensor], context: RolloutContext
    ) -> tuple[RolloutState, th.Tensor]:
        if not th.is_grad_enabled():
            actor_parameters = {name: parameter.detach() for name, parameter in actor_parameters.items()}
        take = partial(self._take, n_steps=n_steps, actor_parameters=actor_parameters, context=context)
        return self._in_blocks(rollout, n_steps, take, context)

    def _take(
        self, rollout: RolloutState, n_steps: int, actor_parameters: dict[str, th.Tensor], context: RolloutContext
    ) -> tuple[RolloutState, th.Tensor]:
        """
        :return: state of a block after some steps, and the reward of each step, ``(n_steps, B, 1)``
        """
        if self._step_loop is None:
            self._step_loop = compile_loop(step, rollout.states.device, self.backend)
        rollout = like_a_middle(rollout, context.model)
        args = (context.actor, actor_parameters, context.model, context.units)
        if th.is_grad_enabled():
            return self._step_loop(rollout, n_steps, *args)
        # The graph is that of steps with a gradient: to compile another one would take longer than it saves
        with th.enable_grad():
            after, rewards = self._step_loop(rollout, n_steps, *args, is_backward_needed=False)
        return RolloutState(*(tensor.detach() for tensor in after)), rewards.detach()

    def hold(
        self, held: HeldState, n_steps: int, env_actions: th.Tensor, model: PriorModel, low: th.Tensor, high: th.Tensor
    ) -> tuple[HeldState, th.Tensor]:
        args = (held, n_steps, env_actions, model, low, high)
        return self._attempt("hold", f"{name_of(model)} and the policy", self._hold, self._eager.hold, args)

    def _hold(
        self, held: HeldState, n_steps: int, env_actions: th.Tensor, model: PriorModel, *bounds: th.Tensor
    ) -> tuple[HeldState, th.Tensor]:
        if self._hold_loop is None:
            self._hold_loop = compile_loop(held_step, env_actions.device, self.backend)
        blocks = Blocks.of(len(env_actions), model, None)
        states, n_left, env_actions = (blocks.split(tensor)[0] for tensor in (*held, env_actions))
        held, is_taken = self._hold_loop(HeldState(states, n_left), n_steps, env_actions, model, *bounds)
        return HeldState(*(blocks.join([tensor]) for tensor in held)), blocks.join([is_taken], dim=1)

    def follow(
        self, planned: PlannedState, n_steps: int, actor_parameters: dict[str, th.Tensor], context: RolloutContext
    ) -> tuple[PlannedState, th.Tensor]:
        args = (planned, n_steps, actor_parameters, context)
        what = f"{name_of(context.model)} and the policy"
        return self._attempt("follow", what, self._follow, self._eager.follow, args)

    def _follow(
        self, planned: PlannedState, n_steps: int, actor_parameters: dict[str, th.Tensor], context: RolloutContext
    ) -> tuple[PlannedState, th.Tensor]:
        # A graph without activations: plans have many more steps than rollouts
        if self._plan_loop is None:
            self._plan_loop = compile_loop(planned_step, planned.states.device, self.backend)
        loop, args = self._plan_loop, (context.actor, actor_parameters, context.model, context.units)
        return self._in_blocks(planned, n_steps, lambda block: loop(block, n_steps, *args), context)

    def policy(self, actor: th.nn.Module, n_rows: int) -> Policy:
        """
        :param actor: the policy
        :param n_rows: number of rows that it is compiled for; other batches run eagerly
        :return: the same policy, for use without gradient and only in one rollout: its parameters must not change
        """
        is_checked = False

        def act_compiled(network_inputs: th.Tensor, actor: th.nn.Module) -> th.Tensor:
            if self._act is None:
                self._act = compile_function(act, network_inputs.device, self.backend)
            return self._act(network_inputs, actor)

        def compiled(network_inputs: th.Tensor) -> th.Tensor:
            nonlocal is_checked
            if len(network_inputs) != n_rows or not self.is_compiled:
                return actor(network_inputs)
            if is_checked:
                with th.compiler.set_stance(skip_guard_eval_unsafe=True):
                    return self._act(network_inputs, actor)  # type: ignore[misc]
            is_checked = True
            return self._attempt("advance", "Policies", act_compiled, act, (network_inputs, actor))

        return compiled


def make_steps(after_update: float, n_rows: int) -> Steps:
    """
    :param after_update: see :class:`StepCompiler`; ``NEVER`` if steps are not compiled
    :param n_rows: see :class:`StepCompiler`
    :return: strategy that steps the model
    """
    return EagerSteps() if after_update == NEVER else StepCompiler(n_rows=n_rows, after_update=after_update)
