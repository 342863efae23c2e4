"""Policies and models as ONNX files, which run without torch and without this library."""

import io
import logging
import re
import warnings
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from sb3_mpg.common.files import write_whole
from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.loading import name_of
from sb3_mpg.common.models.trainable import members_of
from sb3_mpg.common.saved_settings import check_has_model
from sb3_mpg.common.spaces import FlatObservations, statistics_by_key
from sb3_mpg.version import __version__

Exported = Literal["policy", "model"]

# Of values that are computed in another order, in single precision
RELATIVE_TOLERANCE = 1e-3


def dtype_of(space: spaces.Box) -> th.dtype:
    """
    :param space: a box
    :return: its dtype in torch
    """
    return th.from_numpy(np.zeros(0, space.dtype)).dtype


def free_name(key: Any, taken: Collection[str]) -> str:
    """
    :param key: key of an observation
    :param taken: names that others have
    :return: the key as a name that is not taken
    """
    name = str(key)
    while not name or name in taken:
        name = f"observation_{name}"
    return name


class Graph(nn.Module):
    """
    What becomes a file: a module that maps observations of the environment, and maybe actions, to tensors.

    :param name: name of the user's class, for messages
    :param observation_space: space of the observations
    :param outputs: names of the outputs
    :param other_inputs: spaces of the inputs that follow the observations, by name
    """

    def __init__(
        self,
        name: str,
        observation_space: spaces.Space,
        outputs: tuple[str, ...],
        other_inputs: dict[str, spaces.Box] | None = None,
    ):
        super().__init__()
        self.name, self.outputs = name, outputs
        self.flat = FlatObservations(observation_space)
        #: Boxes of all inputs, by name
        self.inputs: dict[str, spaces.Box] = {}
        other_inputs = other_inputs or {}
        for key, box in self.flat.boxes.items():
            self.inputs[free_name(key, (*outputs, *other_inputs, *self.inputs))] = box
        self.inputs |= other_inputs

    def observations_of(self, parts: tuple[th.Tensor, ...]) -> PyTorchObs:
        """
        :param parts: the parts of the observations, ``(B, *shape)`` each
        :return: observations of the space
        """
        return dict(zip(self.flat.boxes, parts, strict=True)) if isinstance(self.flat.space, spaces.Dict) else parts[0]

    def examples(self, n_rows: int, device: th.device) -> tuple[th.Tensor, ...]:
        """
        :param n_rows: number of rows :math:`B`
        :param device: device of the tensors
        :return: an example of each input, ``(B, *shape)``, in its bounds and dtype; always the same ones
        """
        rng = np.random.default_rng(0)
        arrays = [rng.standard_normal((n_rows, *box.shape)).clip(box.low, box.high) for box in self.inputs.values()]
        return tuple(
            th.as_tensor(array.astype(box.dtype), device=device)
            for array, box in zip(arrays, self.inputs.values(), strict=True)
        )

    def dynamic_shapes(self, batch: Any) -> tuple[tuple[dict[int, Any], ...]]:
        """
        :param batch: what stands for the number of rows
        :return: which axes of the inputs are of any size, as torch wants it: there is one argument, the tuple of the inputs
        """
        return (tuple({0: batch} for _ in self.inputs),)


class PolicyGraph(Graph):
    """
    Maps raw observations to the deterministic actions of a policy, as ``predict`` does after ``VecNormalize``.

    :param policy: the policy
    :param env: the ``VecNormalize`` around the environment, if any
    """

    def __init__(self, policy: BasePolicy, env: VecNormalize | None):
        name = f"{type(policy).__name__} with {policy.features_extractor_class.__name__}"
        super().__init__(name, policy.observation_space, ("action",))
        assert isinstance(policy.action_space, spaces.Box), policy.action_space
        self.policy, self.action_dtype = policy, dtype_of(policy.action_space)
        self.action_shape = policy.action_space.shape
        bounds = np.stack([policy.action_space.low, policy.action_space.high])
        # Half precision is only for inputs and outputs
        dtype = th.promote_types(self.action_dtype, th.float32)
        self.low, self.high = th.as_tensor(bounds, dtype=dtype, device=policy.device)
        self.statistics: dict[str, tuple[th.Tensor, th.Tensor]] = {}
        if env is not None and env.norm_obs:
            self.clip = float(env.clip_obs)
            for key, rms in statistics_by_key(env).items():
                # In double precision, as VecNormalize computes: raw observations may be far from zero
                mean, std = rms.mean, np.sqrt(rms.var + env.epsilon)
                self.statistics[key] = (th.as_tensor(mean, device=policy.device), th.as_tensor(std, device=policy.device))

    def normalize(self, key: str, values: th.Tensor) -> th.Tensor:
        """
        :param key: key of a part of the observations
        :param values: the raw part, ``(B, *shape)``
        :return: the same, normalised and clipped if ``VecNormalize`` does so
        """
        if key not in self.statistics:
            return values
        mean, std = self.statistics[key]
        return ((values.double() - mean) / std).clamp(-self.clip, self.clip).float()

    def forward(self, *parts: th.Tensor) -> th.Tensor:
        parts = tuple(self.normalize(key, part) for key, part in zip(self.flat.boxes, parts, strict=True))
        actions = self.policy._predict(self.observations_of(parts), deterministic=True).reshape(-1, *self.action_shape)
        if self.policy.squash_output:
            actions = self.low + 0.5 * (actions + 1) * (self.high - self.low)
        # Rounding may exceed the bounds
        return actions.clamp(self.low, self.high).to(self.action_dtype)


class ModelGraph(Graph):
    """
    Maps raw observations and actions to one step of a model: next observations, rewards, and whether the episode terminates.

    :param model: the model
    :param observation_space: observation space of the environment
    :param action_space: action space of the environment
    """

    def __init__(self, model: PriorModel, observation_space: spaces.Space, action_space: spaces.Box):
        boxes = FlatObservations(observation_space).boxes
        outputs = (*(f"next_{key}" for key in boxes), "reward", "terminated")
        super().__init__(name_of(model), observation_space, outputs, {"action": action_space})
        self.model = model
        # A prediction is no integer
        self.dtypes = {
            key: dtype_of(box) if np.issubdtype(box.dtype, np.floating) else th.float32 for key, box in boxes.items()
        }

    def forward(self, *inputs: th.Tensor) -> tuple[th.Tensor, ...]:
        *parts, actions = inputs
        states = self.model.state_from_observation(self.flat.flatten(self.observations_of(tuple(parts))))
        next_states, rewards = self.model.step(states, actions.float().flatten(1))
        next_observations = self.flat.unflatten(self.model.observation(next_states))
        if not isinstance(next_observations, dict):
            next_observations = {"observation": next_observations}
        next_parts = (next_observations[key].to(dtype) for key, dtype in self.dtypes.items())
        return (*next_parts, rewards, self.model.terminal(next_states))


@contextmanager
def in_evaluation(graph: Graph) -> Iterator[None]:
    """
    Within this context all modules are in evaluation mode and ensembles predict their mean. Afterwards each module has its
    own mode again.

    :param graph: the graph
    """
    modes = {module: module.training for module in graph.modules()}
    graph.eval()
    try:
        with members_of(graph.model, "mean") if isinstance(graph, ModelGraph) else nullcontext():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def without_messages() -> Iterator[None]:
    """Within this context torch does not speak of what it tries for an export. It raises if nothing works."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        # Operations that cannot be followed are printed
        with redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def attempt(name: str, function: Callable[..., Any], *args: Any) -> Any:
    """
    :param name: name of the user's class
    :param function: a part of torch that a user's class may be too much for
    :param args: its arguments
    :return: its result
    :raises ValueError: when it fails
    """
    try:
        # A failure may leave modes of torch behind, in which no random numbers can be drawn. Modes belong to a thread
        with ThreadPoolExecutor(1) as executor:
            return executor.submit(function, *args).result()
    except Exception as error:
        raise ValueError(why_it_failed(name, error)) from error


def why_it_failed(name: str, error: BaseException) -> str:
    """
    :param name: name of the user's class
    :param error: what torch raised
    :return: what is in the way, and what to do
    """
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    operator = re.search(r"OpOverload\(op='(\S+)'", str(cause))
    if operator is not None:
        return f"{name} uses the operator {operator[1]}, which ONNX does not have; write it with other operations of torch."
    reason = next((line.strip(" .") for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
    return (
        f"torch cannot follow what {name} computes ({reason}); compute with torch alone, choose by values with torch.where "
        "instead of `if`, and differentiate with torch.autograd.grad instead of torch.func."
    )


@th.no_grad()
def captured(graph: Graph, device: th.device) -> th.export.ExportedProgram:
    """
    :param graph: the graph
    :param device: device of its tensors
    :return: what the graph computes, for any number of rows
    """
    examples, shapes = graph.examples(2, device), graph.dynamic_shapes(th.export.Dim("batch"))
    try:
        return th.export.export(graph, examples, dynamic_shapes=shapes, strict=False)
    except Exception:
        # This mode reads the code itself. It knows that `len(tensor)` is not always the length of the example
        return th.export.export(graph, examples, dynamic_shapes=shapes, strict=True)


@th.no_grad()
def check_captured(graph: Graph, program: th.export.ExportedProgram, device: th.device) -> None:
    """
    Compare what was captured with the graph itself, for another number of rows.

    :param graph: the graph
    :param program: of :func:`captured`
    :param device: device of its tensors
    :raises ValueError: when they differ, or when what was captured cannot be computed for so many rows
    """
    examples = graph.examples(3, device)
    expected, outputs = graph(*examples), attempt(graph.name, program.module(), *examples)
    expected, outputs = (value if isinstance(value, tuple) else (value,) for value in (expected, outputs))
    for output_name, value, output in zip(graph.outputs, expected, outputs, strict=True):
        value, output = value.double(), output.double()
        absolute = RELATIVE_TOLERANCE * value.abs().nan_to_num(posinf=0.0).max().item()
        if value.shape != output.shape or not th.allclose(value, output, RELATIVE_TOLERANCE, absolute, equal_nan=True):
            raise ValueError(
                f"The output {output_name!r} of {graph.name} would be another one in the file, because it depends on more "
                "than the inputs; draw no noise in evaluation mode, and keep nothing between two calls."
            )


def converted(graph: Graph, program: th.export.ExportedProgram) -> Any:
    """
    :param graph: the graph
    :param program: of :func:`captured`
    :return: the graph as an ``ONNXProgram``
    """
    return th.onnx.export(
        program,
        dynamo=True,
        input_names=list(graph.inputs),
        output_names=list(graph.outputs),
        # Of a program that was captured already, this is only the name
        dynamic_shapes=graph.dynamic_shapes("batch"),
        external_data=False,
        verbose=False,
    )


def check_target(path: Path) -> None:
    """
    :param path: where a file is to be written
    :raises ValueError: when there can be no file
    """
    if path.is_dir():
        raise ValueError(f"The path of the exported file must be that of a file, got the folder {str(path)!r}.")
    if not path.parent.is_dir():
        raise ValueError(f"The folder of the exported file must exist, got {str(path)!r}; create {str(path.parent)!r} first.")


def graph_of(algorithm: Any, what: Exported) -> Graph:
    """
    :param algorithm: an algorithm
    :param what: ``"policy"`` or ``"model"``
    :return: what becomes a file
    :raises ValueError: when there is no model, or ``what`` is something else
    """
    if what == "policy":
        return PolicyGraph(algorithm.policy, algorithm.get_vec_normalize_env())
    if what != "model":
        raise ValueError(f"`what` says what is exported, 'policy' or 'model', got {what!r}.")
    check_has_model(algorithm, "export")
    return ModelGraph(algorithm.rollout_model, algorithm.observation_space, algorithm.action_space)


def write_onnx(algorithm: Any, path: Path, what: Exported) -> None:
    """
    Write the policy or the model of an algorithm as an ONNX file, which takes and gives the units of the environment.

    :param algorithm: the algorithm, which does not change
    :param path: where to write the file; one that exists is replaced
    :param what: ``"policy"``, or ``"model"`` for one step of the model
    :raises ImportError: when a package is missing
    :raises ValueError: when there is no model, when torch cannot convert it, or when there can be no file
    """
    graph = graph_of(algorithm, what)
    check_target(path)
    try:
        import onnxscript  # noqa: F401  # which torch needs
        from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    except ImportError as error:
        raise ImportError(f"{error}; exports need more packages: pip install 'sb3-mpg[export]'") from error
    with in_evaluation(graph), without_messages():
        captured_program = attempt(graph.name, captured, graph, algorithm.device)
        check_captured(graph, captured_program, algorithm.device)
        program = attempt(graph.name, converted, graph, captured_program)
    # Lines of source code and the folders that they are in
    ClearMetadataAndDocStringPass()(program.model)
    description = {
        "sb3_mpg": __version__,
        "algorithm": type(algorithm).__name__,
        "what": what,
        "num_timesteps": algorithm.num_timesteps,
        "observation_space": algorithm.observation_space,
        "action_space": algorithm.action_space,
    }
    program.model.metadata_props.update({key: str(value) for key, value in description.items()})
    write_whole(path, program.model_proto.SerializeToString())
