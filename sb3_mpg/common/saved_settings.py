"""
Settings of parts in files. A file holds them under the names of the constructor's arguments, as those of other algorithms do,
so that ``load``, ``custom_objects`` and ``exclude`` take these names. The state of training is gathered from the parts.

Settings that only training needs may be objects of users' modules. An algorithm can be loaded for predictions where such a
module is missing.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.save_util import is_json_serializable

from sb3_mpg.common.buffers import check_replay_buffer
from sb3_mpg.common.checks import check_default_dtype
from sb3_mpg.common.models.loading import NAMES, import_from_path
from sb3_mpg.common.saved_object import SavedObject
from sb3_mpg.common.settings import SettingOf
from sb3_mpg.common.spaces import check_order
from sb3_mpg.common.training_state import TrainingState, rng_state
from sb3_mpg.common.trust.weighting import ConstantWeighting
from sb3_mpg.common.value_targets import ReplayTarget, make_value_target

# Constructor arguments that define the weighting rule
OF_WEIGHTING_RULE = ("horizons", "weighting", "weighting_kwargs")
# Settings that define the model of the rollouts, those that rollouts need, and all that only training needs
OF_MODEL = ("prior_model", "prior_model_kwargs", "residual_kwargs")
OF_ROLLOUTS = (*OF_MODEL, "weighting_rule")
OF_TRAINING = (*OF_ROLLOUTS, "value_target", "critic_learning_rate", "action_noise")
# What is in the place of a setting that cannot be opened, where the setting-up of an algorithm needs something
MAKE_STAND_IN: dict[str, Callable[[], Any]] = {
    "weighting_rule": lambda: ConstantWeighting((0,)),
    "value_target": ReplayTarget,
}


def assign_loaded_settings(algorithm: BaseAlgorithm) -> None:
    """
    Assign the keyword arguments of ``load``. SB3 writes them into ``__dict__`` before it sets the algorithm up, which bypasses
    descriptors, properties and the constructor. Does nothing for an algorithm that was not loaded.

    :param algorithm: an algorithm that is being set up
    :raises ValueError: for arguments that a saved algorithm does not accept
    """
    attributes = vars(algorithm)
    open_settings(attributes)
    given = [name for name in OF_WEIGHTING_RULE if name in attributes]
    if given:
        raise ValueError(
            f"A saved algorithm keeps its rule for the weights of the horizons, but `load` got {given}; give it "
            "weighting_rule=sb3_mpg.common.trust.make_weighting_rule(weighting, horizons, weighting_kwargs)."
        )
    n_steps = attributes["n_steps"]
    # SB3 keeps those of the replay buffer twice
    if n_steps not in (1, attributes["replay_buffer_kwargs"].get("n_steps", 1)):
        raise ValueError(
            f"A saved algorithm keeps the number of steps of its value target, but `load` got n_steps={n_steps}; give it "
            f"a `value_target` with value_target_kwargs={{'n_steps': {n_steps}}}."
        )
    kwargs = attributes.pop("value_target_kwargs", None)
    attributes["value_target"] = make_value_target(attributes["value_target"], kwargs)
    for name in list(attributes):
        if isinstance(getattr(type(algorithm), name, None), (SettingOf, property)):
            setattr(algorithm, name, attributes.pop(name))


def open_settings(attributes: dict[str, Any]) -> None:
    """
    Open the settings that only training needs. One that cannot be opened is remembered, with what is in its place.

    :param attributes: the attributes of an algorithm that is being set up
    """

    def check(value: Any) -> None:
        # A prior model that is given as a path is looked up only where it is made
        if name == "prior_model" and isinstance(value, str) and value not in NAMES:
            import_from_path(value)

    for name in OF_TRAINING:
        saved = attributes.get(name)
        if isinstance(saved, SavedObject):
            attributes[name] = saved.opened(check)
            if attributes[name] is saved:
                attributes[name] = MAKE_STAND_IN.get(name, lambda saved=saved: saved)()
                attributes["training_state"].unopened[name] = (saved, attributes[name])


def unopened(algorithm: Any, name: str) -> SavedObject | None:
    """
    :param algorithm: an algorithm
    :param name: name of a setting
    :return: the setting as it was saved, if it could not be opened and was not replaced since
    """
    saved, stand_in = algorithm.training_state.unopened.get(name, (None, None))
    return saved if saved is not None and getattr(algorithm, name) is stand_in else None


def check_opened(algorithm: Any, names: Sequence[str]) -> None:
    """
    :param algorithm: an algorithm
    :param names: names of the settings that are needed; those of the model only count if it is used
    :raises ValueError: when one of them could not be opened
    """
    for name in names:
        saved = unopened(algorithm, name)
        if saved is not None and (name not in OF_MODEL or algorithm.trust.uses_model):
            raise ValueError(
                f"This needs the `{name}` of the loaded file, which cannot be opened ({saved.error}): make it importable, or "
                f"pass `{name}=` to `load`; predictions do without."
            )


def check_has_model(algorithm: Any, purpose: str) -> None:
    """
    :param algorithm: an algorithm
    :param purpose: what its model is needed for, for the message
    :raises ValueError: when it has none, or one that could not be opened
    """
    check_opened(algorithm, OF_ROLLOUTS)
    if not algorithm.trust.uses_model or algorithm.env is None:
        raise ValueError(f"There is no model to {purpose}: the only horizon is 0, or the environment is missing (`set_env`).")


def prepare_training(algorithm: Any) -> None:
    """
    Check an algorithm before it trains, and renew its update if what it is made of was replaced since it was set up.

    :param algorithm: the algorithm
    :raises ValueError: when the environment is missing or has its observations in another order, a setting could not be
        opened, the replay buffer does not fit, measured weights have too little to compare, or torch's default precision was
        changed
    """
    check_default_dtype()
    check_opened(algorithm, OF_TRAINING)
    if algorithm.env is None:
        raise ValueError("Training needs an environment: give `load` one (`env=`), or call `set_env`.")
    check_order(algorithm.env.observation_space, algorithm.observation_space)
    algorithm.value_target = make_value_target(algorithm.value_target)
    check_replay_buffer(algorithm.replay_buffer, algorithm)
    renew_if_outdated(algorithm)


def renew_if_outdated(algorithm: Any) -> None:
    """
    Renew the update of an algorithm if what it is made of was replaced, which a callback may do at any time.

    :param algorithm: the algorithm
    :raises ValueError: when measured weights have too little to compare
    """
    if algorithm.model_settings.is_outdated(algorithm.policy, algorithm.trust):
        algorithm.renew_update()
    if algorithm.model_fitting is not None:
        algorithm.trust.check_comparison(algorithm.update.n_critics, algorithm.model_fitting.model.n_members)


def gathered_state(algorithm: Any) -> TrainingState:
    """
    :param algorithm: an algorithm
    :return: its training state, with the states of the random number generators, of the model's fitting, of the reused
        batches, of the plans and of the measurements
    """
    state: TrainingState = algorithm.training_state
    return replace(
        state,
        rng=rng_state(algorithm.device) if state.rng is None else state.rng,
        fitting=state.fitting if algorithm.model_fitting is None else algorithm.model_fitting.state(),
        batches=algorithm.update.batches.state(algorithm.batch_reuse),
        plans=replace(state.plans, taken=algorithm.update.plans.state_dict()),
        measurements=algorithm.trust.measurements if state.measurements is None else state.measurements,
        unopened={},
    )


@contextmanager
def attributes_to_save(algorithm: BaseAlgorithm) -> Iterator[None]:
    """
    Within this context ``__dict__``, which SB3 saves, holds the gathered state, the settings of parts, and a prior model as a
    copy on the CPU, so that a file of a GPU can be read without one.

    :param algorithm: an algorithm that is being saved
    """
    attributes, cls = vars(algorithm), type(algorithm)
    of_parts = [name for name in dir(cls) if isinstance(getattr(cls, name), SettingOf)]
    names = {*of_parts, "residual", *OF_TRAINING}
    settings: dict[str, Any] = {name: unopened(algorithm, name) or getattr(algorithm, name) for name in names}
    if isinstance(settings["prior_model"], th.nn.Module):
        settings["prior_model"] = copy.deepcopy(settings["prior_model"]).cpu()
    for name in OF_TRAINING:
        is_path = name == "prior_model" and settings[name] not in NAMES
        if is_path or not is_json_serializable(settings[name]):
            settings[name] = SavedObject.of(settings[name])
    before = dict(attributes)
    attributes.update(settings, training_state=gathered_state(algorithm))
    try:
        yield
    finally:
        attributes.clear()
        attributes.update(before)
