"""
Settings of parts in files. A file holds them under the names of the constructor's arguments, as those of other algorithms do,
so that ``load``, ``custom_objects`` and ``exclude`` take these names. The state of training is gathered from the parts.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_mpg.common.settings import SettingOf
from sb3_mpg.common.training_state import TrainingState, rng_state
from sb3_mpg.common.value_targets import make_value_target

# Constructor arguments that define the weighting rule
OF_WEIGHTING_RULE = ("horizons", "weighting", "weighting_kwargs")


def assign_loaded_settings(algorithm: BaseAlgorithm) -> None:
    """
    Assign the keyword arguments of ``load``. SB3 writes them into ``__dict__`` before it sets the algorithm up, which bypasses
    descriptors, properties and the constructor. Does nothing for an algorithm that was not loaded.

    :param algorithm: an algorithm that is being set up
    :raises ValueError: for arguments that a saved algorithm does not accept
    """
    attributes = vars(algorithm)
    given = [name for name in OF_WEIGHTING_RULE if name in attributes]
    if given:
        raise ValueError(
            f"A saved algorithm keeps its rule for the weights of the horizons, but `load` got {given}; give it "
            "weighting_rule=sb3_mpg.common.trust.make_weighting_rule(weighting, horizons, weighting_kwargs)."
        )
    kwargs = attributes.pop("value_target_kwargs", None)
    attributes["value_target"] = make_value_target(attributes["value_target"], kwargs)
    for name in list(attributes):
        if isinstance(getattr(type(algorithm), name, None), (SettingOf, property)):
            setattr(algorithm, name, attributes.pop(name))


def gathered_state(algorithm: Any) -> TrainingState:
    """
    :param algorithm: an algorithm
    :return: its training state, with the states of the random number generators, of the model's fitting, of the reused
        batches and of the measurements
    """
    state: TrainingState = algorithm.training_state
    return replace(
        state,
        rng=rng_state(algorithm.device) if state.rng is None else state.rng,
        fitting=state.fitting if algorithm.model_fitting is None else algorithm.model_fitting.state(),
        batches=algorithm.update.batches.state(algorithm.batch_reuse),
        measurements=algorithm.trust.measurements,
    )


@contextmanager
def attributes_to_save(algorithm: BaseAlgorithm) -> Iterator[None]:
    """
    Within this context ``__dict__``, which SB3 saves, holds the gathered state, the settings of parts, and a prior model as a
    copy on the CPU, so that a file of a GPU can be read without one.

    :param algorithm: an algorithm that is being saved
    """
    attributes, cls = vars(algorithm), type(algorithm)
    names = [name for name in dir(cls) if isinstance(getattr(cls, name), SettingOf)]
    settings = {name: getattr(algorithm, name) for name in [*names, "residual", "weighting_rule"]}
    if isinstance(settings["prior_model"], th.nn.Module):
        settings["prior_model"] = copy.deepcopy(settings["prior_model"]).cpu()
    state = attributes["training_state"]
    attributes.update(settings, training_state=gathered_state(algorithm))
    try:
        yield
    finally:
        for name in settings:
            del attributes[name]
        attributes["training_state"] = state
