"""Makes prior models of what users pass as ``prior_model``, and names them in messages."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch as th
from stable_baselines3.common.vec_env import VecEnv

from sb3_mpg.common.checks import check_keywords
from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.double_precision import InDoublePrecision
from sb3_mpg.common.models.dynamics import DynamicsModel
from sb3_mpg.common.models.trainable import CorrectedModel
from sb3_mpg.common.spaces import FlatObservations, flat_box

#: Texts that are no path to a model: the environment's own, and learned dynamics
NAMES = ("auto", "learned")
#: What the ``prior_model`` argument of the algorithms may be.
PriorModelLike = PriorModel | type[PriorModel] | Callable[..., PriorModel] | str

HOW_TO_WRITE_A_MODEL = """A prior model is what you know about your system, in torch:

    import torch as th
    from sb3_mpg import PriorModel

    class MyModel(PriorModel):
        def transition(self, states, actions):                 # (B, S), (B, A) -> (B, S)
            position, velocity = states.split(1, dim=1)
            return th.cat([position + 0.1 * velocity, velocity + 0.1 * actions], dim=1)

        def reward(self, states, actions, next_states):        # -> (B, 1)
            return -(states**2).sum(dim=1, keepdim=True)

Pass it as `prior_model=MyModel`, or let the environment offer it with a method `prior_model()`. If you know nothing of the
system, a model can be learned: `prior_model="learned"`."""


def import_from_path(path: str) -> Callable[..., PriorModel]:
    """
    :param path: dotted path, ``"package.module:Class"``
    :return: the class or factory
    :raises ValueError: when it does not exist
    """
    module_name, separator, name = path.partition(":")
    if not separator:
        raise ValueError(
            f"A prior model given as text must be 'auto', 'learned' or a path 'package.module:Class', got {path!r}."
        )
    try:
        return getattr(importlib.import_module(module_name), name)
    except ModuleNotFoundError as error:
        # A missing import inside the user's module keeps its own error
        if error.name is not None and not (module_name + ".").startswith(error.name + "."):
            raise
        raise ValueError(f"The prior model {path!r} was not found: there is no module {error.name!r}.") from error
    except AttributeError as error:
        raise ValueError(f"The prior model {path!r} was not found: module {module_name!r} has no {name!r}.") from error


def with_spaces(make: Callable[..., PriorModel], kwargs: dict[str, Any], env: VecEnv) -> dict[str, Any]:
    """
    :param make: a class or factory of models
    :param kwargs: arguments that the user gives
    :param env: the environment
    :return: these arguments, and those that learned dynamics need: the boxes of flat observations and actions if the class or
        factory has parameters called ``observation_space`` or ``action_space``, and the specification of the environment for
        one called ``spec``
    """
    try:
        parameters = inspect.signature(make).parameters
    except (TypeError, ValueError):
        return kwargs  # a callable that does not tell its parameters
    known = {
        "observation_space": lambda: FlatObservations(env.observation_space).box,
        "action_space": lambda: flat_box(env.action_space),
        "spec": lambda: env.get_attr("spec", indices=[0])[0] if env.has_attr("spec") else None,
    }
    return {**{name: find() for name, find in known.items() if name in parameters and name not in kwargs}, **kwargs}


def make_prior_model(prior_model: PriorModelLike, env: VecEnv, prior_model_kwargs: dict[str, Any] | None = None) -> PriorModel:
    """
    :param prior_model: a model, a class or factory of models, a dotted path to one, ``"auto"``: the environment's own, or
        ``"learned"``: a ``DynamicsModel``. Parameters ``observation_space``, ``action_space`` and ``spec`` of a class or
        factory get those of the environment
    :param env: the environment
    :param prior_model_kwargs: other arguments of the class or factory
    :return: the model
    :raises ValueError: when the environment offers no model, or the path does not exist
    :raises TypeError: when the result is no ``PriorModel``
    """
    kwargs = prior_model_kwargs or {}
    model: Any
    if isinstance(prior_model, PriorModel):
        if kwargs:
            raise ValueError(
                "`prior_model_kwargs` goes with a class, a factory, a path, 'auto' or 'learned', but `prior_model` is a "
                "model."
            )
        model = prior_model
    elif prior_model == "auto":
        offers_none = f"No `prior_model` was given and the environment offers none.\n{HOW_TO_WRITE_A_MODEL}"
        if not env.has_attr("prior_model"):
            raise ValueError(offers_none)
        try:
            model = env.env_method("prior_model", indices=[0], **kwargs)[0]
        except (TypeError, NotImplementedError):
            # Asked only now, because a worker process would send its whole environment along with a method
            model = env.get_attr("prior_model", indices=[0])[0]
            if callable(model) and not isinstance(model, PriorModel):
                raise
            if model is None:
                raise ValueError(offers_none) from None
        except EOFError as error:
            raise ValueError(
                "The environment's `prior_model()` failed in its worker process, or its model cannot be sent from there, as "
                "one whose class is defined in the script itself. Move the class into a module, or pass `prior_model=`."
            ) from error
    elif prior_model == "learned":
        model = DynamicsModel(**with_spaces(DynamicsModel, check_keywords("prior_model_kwargs", kwargs, DynamicsModel), env))
    elif isinstance(prior_model, str):
        make = import_from_path(prior_model)
        if not callable(make):
            raise TypeError(f"`prior_model` {prior_model!r} names {make!r}, which is neither a class nor a function.")
        model = make(**with_spaces(make, kwargs, env))
    elif callable(prior_model) and not isinstance(prior_model, th.nn.Module):
        model = prior_model(**with_spaces(prior_model, kwargs, env))
    else:
        model = prior_model
    if not isinstance(model, PriorModel):
        raise TypeError(
            f"`prior_model` must be a PriorModel, a class or factory of one, 'package.module:Class', 'auto' or 'learned', "
            f"got {model!r}. (Without any model: horizons=(0,), weighting='constant'.)\n{HOW_TO_WRITE_A_MODEL}"
        )
    return model


def name_of(model: PriorModel) -> str:
    """
    :param model: the user's model, or a model of this library around it
    :return: the name of the user's class
    """
    if isinstance(model, CorrectedModel):
        model = model.prior
    return type(model.model if isinstance(model, InDoublePrecision) else model).__name__
