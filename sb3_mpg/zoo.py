"""
Adds the algorithms and environments of this project to RL Zoo (https://github.com/DLR-RM/rl-baselines3-zoo).

RL Zoo has no plugin interface, so :func:`register` changes its tables in place. The import hook of ``_zoo_hook.py`` calls it
when RL Zoo is imported: ``python -m rl_zoo3.train --algo mpg`` works once this package is installed. Without the hook,
``python -m sb3_mpg.zoo train --algo mpg`` does the same.
"""

import ast
import difflib
import functools
import importlib.util
import inspect
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Iterable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, FunctionType, TracebackType
from typing import TYPE_CHECKING, Any, SupportsFloat

import gymnasium as gym
import yaml

from sb3_mpg.common.models.loading import HOW_TO_WRITE_A_MODEL
from sb3_mpg.common.torch_layers import ObservationScaler
from sb3_mpg.dvpg import DVPG
from sb3_mpg.hyperparams_opt import SAMPLERS, convert_params
from sb3_mpg.mpg import MPG
from sb3_mpg.nadp import NStepADP
from sb3_mpg.ndpg import NStepDPG

# Only `register` imports RL Zoo itself: workers of vectorized environments import this module for its wrapper
if TYPE_CHECKING:
    import optuna

ALGORITHMS: dict[str, type[MPG]] = {"mpg": MPG, "ndpg": NStepDPG, "nadp": NStepADP, "dvpg": DVPG}

#: Commands of ``python -m sb3_mpg.zoo`` and the RL Zoo modules that they run
COMMANDS = {
    "train": "rl_zoo3.train",
    "enjoy": "rl_zoo3.enjoy",
    "record_video": "rl_zoo3.record_video",
    "record_training": "rl_zoo3.record_training",
    "all_plots": "rl_zoo3.plots.all_plots",
    "plot_train": "rl_zoo3.plots.plot_train",
    "plot_from_file": "rl_zoo3.plots.plot_from_file",
}

#: RL Zoo scripts with a list of the off-policy algorithms among their constants
SCRIPTS_WITH_LISTS = ("rl_zoo3.enjoy", "rl_zoo3.record_video")

#: Keys of a hyperparameter file that RL Zoo removes before it passes the rest to the constructor
ZOO_KEYS = frozenset(
    "n_timesteps n_envs normalize env_wrapper vec_env_wrapper callback frame_stack monitor_kwargs env_kwargs "
    "noise_type noise_std".split()
)
#: Arguments that RL Zoo itself passes to the constructor
PASSED_BY_ZOO = frozenset(["self", "env", "tensorboard_log", "seed", "verbose", "device", "_init_setup_model"])

LEARNING_RATES = ("learning_rate", "critic_learning_rate")
#: Hyperparameters whose text needs no second pair of quotes in ``-params``: ``-params prior_model:package.module:Class``
TEXT_KEYS = frozenset(
    [*LEARNING_RATES, *"prior_model weighting value_target differentiate compile policy replay_buffer_class".split()]
)
#: Hyperparameters that are saved with the agent and cannot be changed when training is continued
SET_AT_CONSTRUCTION = ("horizons", "weighting", "weighting_kwargs", "value_target", "value_target_kwargs", "n_steps")


class ZooError(ValueError):
    """A mistake in the user's input. RL Zoo's commands print its message without a traceback."""


class ScaleReward(gym.RewardWrapper):
    """
    Multiplies rewards, for algorithms without ``reward_scale``. RL Zoo's evaluations still report the unscaled rewards.

    :param env: the environment
    :param factor: factor of its rewards
    """

    def __init__(self, env: gym.Env, factor: float):
        super().__init__(env)
        self.factor = factor

    def reward(self, reward: SupportsFloat) -> float:
        return self.factor * float(reward)


# Hyperparameter files


def hyperparameter_folder() -> Path:
    """
    :return: the folder of the hyperparameter files: the package ``sb3_mpg.hyperparams``, or ``hyperparams`` of a checkout
    """
    spec = importlib.util.find_spec("sb3_mpg.hyperparams")
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(__file__).parents[1] / "hyperparams"


def hyperparameter_file(algorithm: str, env_id: str, chosen: str | None = None) -> str | None:
    """
    :param algorithm: name of the algorithm in RL Zoo
    :param env_id: id of the environment
    :param chosen: the user's ``--conf-file``; the name of one of our files is enough
    :return: path of our file to read, ``None`` to leave the choice to RL Zoo
    """
    if chosen:
        path = hyperparameter_folder() / chosen
        return str(path) if path.is_file() and not Path(chosen).exists() else None
    path = hyperparameter_folder() / f"{algorithm}.yml"
    if algorithm in ALGORITHMS:
        return str(path)
    # Baselines: ours for our environments, RL Zoo's for all others
    if path.is_file() and env_id in yaml.safe_load(path.read_text(encoding="utf-8")):
        return str(path)
    return None


def check_hyperparameters(algorithm: type, hyperparams: dict[str, Any], where: str) -> None:
    """
    :param algorithm: class of the algorithm
    :param hyperparams: an entry of a hyperparameter file
    :param where: name of the file and the entry
    :raises ZooError: when a key is unknown to RL Zoo and the constructor, or a required key is missing
    """
    allowed = ZOO_KEYS | inspect.signature(algorithm).parameters.keys() - PASSED_BY_ZOO
    for key in hyperparams:
        if key not in allowed:
            close = difflib.get_close_matches(str(key), allowed, n=1)
            hint = f", did you mean {close[0]!r}?" if close else f"; it takes {', '.join(sorted(allowed))}."
            raise ZooError(f"{where}: {algorithm.__name__} has no hyperparameter {key!r}{hint}")
    for key in ("n_timesteps", "policy"):
        if key not in hyperparams:
            raise ZooError(f"{where}: {key!r} is missing.")


# Changes of RL Zoo


def _wrap(owner: type, name: str, wrapper: Callable[..., Any]) -> None:
    """
    Wrap a method. Does nothing if it is wrapped already.

    :param owner: class of the method
    :param name: name of the method
    :param wrapper: called with the original method and the arguments of the call
    """
    attribute = inspect.getattr_static(owner, name)
    original = attribute.__func__ if isinstance(attribute, staticmethod) else attribute
    if hasattr(original, "changed_by_sb3_mpg"):
        return

    @functools.wraps(original)
    def changed(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    changed.changed_by_sb3_mpg = True  # type: ignore[attr-defined]
    setattr(owner, name, staticmethod(changed) if isinstance(attribute, staticmethod) else changed)


def _init(original: Callable, self: Any, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    chosen = inspect.signature(original).bind(self, *args, **kwargs).arguments.get("config")
    self.config = hyperparameter_file(self.algo, self.env_name.gym_id, chosen) or self.config


def _read_hyperparameters(original: Callable, self: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    if self.algo not in ALGORITHMS:
        return original(self)
    try:
        hyperparams, saved_hyperparams = original(self)
    except yaml.YAMLError as error:
        raise ZooError(f"{self.config} is not a YAML file: {error}") from error
    except (OSError, ModuleNotFoundError) as error:
        raise ZooError(f"The hyperparameter file {self.config} cannot be read: {error}") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise ZooError(
            f"{self.config} must give, for each environment (or `default`), names and values of hyperparameters; "
            f"reading it as such failed: {error}"
        ) from error
    check_hyperparameters(ALGORITHMS[self.algo], hyperparams, f"{self.config}, {self.env_name.gym_id}")
    return hyperparams, saved_hyperparams


def _preprocess_schedules(original: Callable, hyperparams: dict[str, Any]) -> dict[str, Any]:
    from rl_zoo3.utils import linear_schedule

    # RL Zoo looks for schedules in `learning_rate` only, and its error does not name key and value
    for key in LEARNING_RATES:
        value = hyperparams.get(key)
        if not isinstance(value, str):
            continue
        try:
            name, _, initial_value = value.partition("_")
            if name != "lin":
                raise ValueError(f"unknown schedule {name!r}")
            initial_rate = float(initial_value)
        except ValueError as error:
            raise ZooError(f"`{key}` must be a number or a schedule like lin_3e-4, got {value!r}.") from error
        if key != "learning_rate":
            hyperparams[key] = linear_schedule(initial_rate)
    return original(hyperparams)


def _setup_experiment(original: Callable, self: Any) -> Any:
    if self.algo not in ALGORITHMS:
        return original(self)
    try:
        return original(self)
    except (TypeError, ValueError) as error:
        # The messages of our constructors are for the user; a bug elsewhere keeps its traceback
        is_ours = _is_within(_last_file(error.__traceback__), Path(__file__).parent)
        if is_ours or "unexpected keyword argument" in str(error):
            hint = "\nIn RL Zoo: -params prior_model:package.module:MyModel" if HOW_TO_WRITE_A_MODEL in str(error) else ""
            raise ZooError(f"{error}{hint}") from error
        raise


def _load_pretrained_agent(original: Callable, self: Any, hyperparams: dict[str, Any], env: Any) -> Any:
    if self.algo in ALGORITHMS:
        given = [key for key in SET_AT_CONSTRUCTION if hyperparams.pop(key, None) is not None]
        ignored = [key for key in given if key in (self.custom_hyperparams or {})]
        if ignored:
            print(f"Ignored, because the saved agent keeps its own values: {', '.join(ignored)}")
    return original(self, hyperparams, env)


def _objective(original: Callable, self: Any, trial: "optuna.Trial") -> float:
    from optuna.exceptions import TrialPruned

    try:
        return original(self, trial)
    except FloatingPointError as error:
        # RL Zoo prunes trials with non-finite gradients only for the exceptions of its own algorithms
        raise TrialPruned(str(error)) from error


def _store_dict(original: Callable, self: Any, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
    original(self, parser, namespace, [_quote_text(value) for value in values], option_string)


def _quote_text(argument: str) -> str:
    """
    :param argument: ``key:value`` of the command line; RL Zoo evaluates the value as Python
    :return: the same, with quotes around a value that is plain text
    """
    key, _, value = argument.partition(":")
    if key in TEXT_KEYS and re.fullmatch(r"[A-Za-z_][\w.:+-]*", value):
        try:
            ast.literal_eval(value)
        except (SyntaxError, ValueError):
            return f"{key}:{value!r}"
    return argument


def with_our_algorithms(code: CodeType) -> CodeType:
    """
    :param code: code of an RL Zoo script
    :return: the same code; each list of off-policy algorithms among its constants contains ours as well
    """
    constants = []
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            constant = with_our_algorithms(constant)
        elif isinstance(constant, tuple) and {"sac", "td3", "tqc"} <= set(constant):
            constant = (*constant, *(name for name in ALGORITHMS if name not in constant))
        constants.append(constant)
    return code.replace(co_consts=tuple(constants))


class ScriptFinder:
    """Finder that adds our algorithms to the lists of RL Zoo's scripts when they are imported or run (``python -m``)."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in SCRIPTS_WITH_LISTS:
            return None
        others: Iterable[Any] = (finder for finder in list(sys.meta_path) if not isinstance(finder, ScriptFinder))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and hasattr(spec.loader, "get_code"):
            get_code = spec.loader.get_code
            spec.loader.get_code = lambda fullname: with_our_algorithms(get_code(fullname))
        return spec


def _last_file(tb: TracebackType | None) -> str:
    return [frame.f_code.co_filename for frame, _ in traceback.walk_tb(tb)][-1]


def _is_within(path: str, folder: Path) -> bool:
    return folder in Path(path).parents


def is_told_in_one_message(error: BaseException, tb: TracebackType | None) -> bool:
    """
    :param error: an uncaught exception
    :param tb: its traceback
    :return: whether a command of RL Zoo should print only the message: a mistake in the user's input, not a bug
    """
    import rl_zoo3

    folder = Path(rl_zoo3.__file__).parent
    if isinstance(error, ZooError):
        is_mistake = True
    else:
        # RL Zoo's scripts raise these for environments and agents that do not exist
        names = {word.removeprefix("--algo=") for word in sys.argv}
        is_from_zoo = isinstance(error, (AssertionError, ValueError)) and _is_within(_last_file(tb), folder)
        is_mistake = bool(names & ALGORITHMS.keys()) and is_from_zoo and bool(str(error))
    # The user's own programs keep their tracebacks
    scripts = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(tb) if frame.f_globals.get("__name__") == "__main__"]
    commands = [frame for frame, _ in traceback.walk_tb(tb) if frame.f_globals.get("__name__") == "rl_zoo3.cli"]
    return is_mistake and (bool(commands) or any(_is_within(script, folder) for script in scripts))


def _install_excepthook() -> None:
    previous = sys.excepthook
    if hasattr(previous, "changed_by_sb3_mpg"):
        return

    def excepthook(kind: type[BaseException], error: BaseException, tb: TracebackType | None) -> None:
        if is_told_in_one_message(error, tb):
            print(f"error: {error}", file=sys.stderr)
        else:
            previous(kind, error, tb)

    excepthook.changed_by_sb3_mpg = True  # type: ignore[attr-defined]
    sys.excepthook = excepthook


def register() -> None:
    """Add our algorithms, hyperparameter files and environments to RL Zoo. Calling it again changes nothing."""
    # Import names, not modules: the import hook calls this function while `rl_zoo3.utils` is being imported
    from rl_zoo3 import exp_manager, hyperparams_opt
    from rl_zoo3.utils import ALGOS, StoreDict

    import sb3_mpg_envs  # noqa: F401

    ALGOS.update(ALGORITHMS)
    hyperparams_opt.HYPERPARAMS_SAMPLER.update(SAMPLERS)
    hyperparams_opt.HYPERPARAMS_CONVERTER.update(dict.fromkeys(ALGORITHMS, convert_params))

    # RL Zoo evaluates `policy_kwargs` in this namespace
    exp_manager.ObservationScaler = ObservationScaler  # type: ignore[attr-defined]
    manager = exp_manager.ExperimentManager
    _wrap(manager, "__init__", _init)
    _wrap(manager, "read_hyperparameters", _read_hyperparameters)
    _wrap(manager, "_preprocess_schedules", _preprocess_schedules)
    _wrap(manager, "setup_experiment", _setup_experiment)
    _wrap(manager, "_load_pretrained_agent", _load_pretrained_agent)
    _wrap(manager, "objective", _objective)
    _wrap(StoreDict, "__call__", _store_dict)

    # Change the lists in scripts that are imported later, and in those that are imported already
    if not any(isinstance(finder, ScriptFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, ScriptFinder())
    for name in SCRIPTS_WITH_LISTS:
        for function in vars(sys.modules.get(name, object())).values() if name in sys.modules else ():
            if isinstance(function, FunctionType) and function.__module__ == name:
                function.__code__ = with_our_algorithms(function.__code__)
    _install_excepthook()


def main() -> None:
    """``python -m sb3_mpg.zoo COMMAND ...``: run a command of RL Zoo without the import hook."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command not in COMMANDS:
        sys.exit(f"usage: python -m sb3_mpg.zoo {{{','.join(COMMANDS)}}} ...\nerror: unknown command {command!r}")
    if importlib.util.find_spec("rl_zoo3") is None:
        sys.exit("error: RL Zoo is not installed: pip install 'sb3-mpg[zoo]'")
    register()
    del sys.argv[1]
    runpy.run_module(COMMANDS[command], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    # Run the imported module, not its copy `__main__`: `register` recognises its own finder by the class of the former
    from sb3_mpg.zoo import main

    main()
