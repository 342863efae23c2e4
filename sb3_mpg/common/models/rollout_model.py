"""From the settings of an algorithm to the model of its rollouts."""

from dataclasses import dataclass, field
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.vec_env import VecEnv

from sb3_mpg.common.checks import check_keywords, warn_of_wrappers
from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.checking.checker import validate_prior_model
from sb3_mpg.common.models.loading import PriorModelLike, make_prior_model
from sb3_mpg.common.models.residual import ResidualModel
from sb3_mpg.common.models.trainable import TrainableModel
from sb3_mpg.common.saved_object import SavedObject
from sb3_mpg.common.spaces import FlatObservations, flat_box
from sb3_mpg.common.value_targets import ValueTarget


@dataclass
class ModelSettings:
    """
    :param prior_model: the user's knowledge of the system, see :func:`~sb3_mpg.common.models.loading.make_prior_model`
    :param prior_model_kwargs: arguments of the class or factory of the prior model
    :param residual: whether the prior model is corrected by recorded steps. A model that is trainable itself never is.
    :param residual_kwargs: arguments of ``ResidualModel``
    """

    prior_model: PriorModelLike = "auto"
    prior_model_kwargs: dict[str, Any] | None = None
    residual: bool = True
    residual_kwargs: dict[str, Any] | None = None
    _users: tuple[Any, ...] = field(default=(), init=False, repr=False)

    def check(self) -> None:
        """
        :raises ValueError: for impossible values
        """
        if not isinstance(self.residual, bool):
            raise ValueError(f"`residual` says whether the model is corrected, True or False, got {self.residual!r}.")
        if self.is_open:
            check_keywords("residual_kwargs", self.residual_kwargs, ResidualModel, "prior", "n_states", "n_actions")

    @property
    def is_open(self) -> bool:
        """Whether nothing of them is closed in a file, because it belongs to a module that is missing."""
        return not any(isinstance(value, SavedObject) for value in vars(self).values())

    def _users_of(self, policy: BasePolicy, trust: Any) -> tuple[Any, ...]:
        needs_fitting = self.residual or trust.rule.needs_errors
        return policy, self.prior_model, self.prior_model_kwargs, self.residual_kwargs, trust.uses_model, needs_fitting

    def note_users(self, policy: BasePolicy, trust: Any) -> None:
        """
        Remember what a model was made of, and for whom.

        :param policy: the policy
        :param trust: the trust in the model
        """
        self._users = self._users_of(policy, trust)

    def is_outdated(self, policy: BasePolicy, trust: Any) -> bool:
        """
        :param policy: the policy
        :param trust: the trust in the model
        :return: whether one of them, or a setting, was replaced since the model was made
        """
        return any(new is not old for new, old in zip(self._users_of(policy, trust), self._users, strict=True))

    def find_prior(
        self, env: VecEnv | None, device: th.device, is_needed: bool, value_target: ValueTarget
    ) -> PriorModel | None:
        """
        :param env: the environment
        :param device: device of the model
        :param is_needed: whether the model is ever stepped
        :param value_target: the value target, which may need a simulator of the environment
        :return: the prior model; a plain ``PriorModel`` if it is not needed, ``None`` if it is missing: without an
            environment, or where the settings are not open
        :raises ValueError: when the environment lacks a model or simulator that is needed, or the model cannot be used
        """
        if env is None or (is_needed and not self.is_open):
            return None
        model = self._make_prior(env, device) if is_needed else PriorModel()
        value_target.check_env(env)
        users = ["prior_model='auto'"] if is_needed and self.prior_model == "auto" else []
        warn_of_wrappers(env, users + ([type(value_target).__name__] if value_target.needs_simulator else []))
        return model

    def _make_prior(self, env: VecEnv, device: th.device) -> PriorModel:
        """
        Find the prior model, and check it before the first environment step.

        :param env: the environment
        :param device: device of the model
        :return: the prior model
        :raises ValueError: when there is none, or it violates the interface
        """
        model = make_prior_model(self.prior_model, env, self.prior_model_kwargs).to(device)
        try:
            validate_prior_model(model, FlatObservations(env.observation_space).box, flat_box(env.action_space), device)
        except ValueError as error:
            if self.prior_model != "auto":
                raise
            raise ValueError(
                f"{error}\nThe model is the environment's own (prior_model='auto') and ignores wrappers around "
                "the environment: if there are any, pass a model of the wrapped environment."
            ) from error
        return model

    def make_trainable(
        self, model: PriorModel, observation_space: spaces.Space, action_space: spaces.Box, device: th.device
    ) -> TrainableModel:
        """
        :param model: the prior model
        :param observation_space: observation space of the environment
        :param action_space: action space of the environment
        :param device: device of the model
        :return: the model itself if it is trainable, otherwise a ``ResidualModel`` of it, whose correction is used if
            ``residual`` is true
        """
        if isinstance(model, TrainableModel):
            return model
        observation = th.zeros(1, FlatObservations(observation_space).n_elements, device=device)
        n_states = model.state_from_observation(observation).shape[1]
        n_actions = get_action_dim(action_space)
        corrected = ResidualModel(model, n_states, n_actions, **(self.residual_kwargs or {})).to(device)
        corrected.use_correction(self.residual)
        return corrected
