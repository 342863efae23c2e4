"""The interface between a user's knowledge of their system and the algorithms of this library."""

import torch as th


class PriorModel(th.nn.Module):
    """
    A differentiable model of the environment: what the user knows about their system, written in torch.

    The model is *stateless* and *batched*: every method maps a batch to a batch, row by row, and keeps nothing between
    calls. It uses the environment's own units: raw observations (before any ``VecNormalize``) and actions between
    ``action_space.low`` and ``action_space.high``. Every per-sample quantity has shape ``(B, 1)``, never ``(B,)``.

    Only :meth:`transition` and :meth:`reward` must be written. When the model's state is not the observation, write
    :meth:`observation` and :meth:`state_from_observation` too::

        class Cart(PriorModel):
            def transition(self, states, actions):
                position, velocity = states.split(1, dim=1)
                return th.cat([position + 0.1 * velocity, velocity + 0.1 * actions], dim=1)

            def reward(self, states, actions, next_states):
                return -(states**2).sum(dim=1, keepdim=True) - 0.01 * actions**2

    All methods must be differentiable in states and actions and keep the dtype and the device of their arguments.
    A model may be random. It must draw noise only while ``self.training`` is true and use the mean otherwise (as dropout
    does), so that it can be checked and evaluated without noise.
    Check a model with :func:`sb3_mpg.check_prior_model` before training on it.

    The vocabulary is that of Gymnasium's ``FuncEnv``.
    """

    def transition(self, states: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        One step of the dynamics; a model step takes as long as an environment step.

        :param states: states, ``(B, S)``
        :param actions: actions in the units of the environment, ``(B, A)``
        :return: next states, ``(B, S)``
        """
        raise NotImplementedError(f"{type(self).__name__} must implement transition(states, actions) -> (B, S)")

    def reward(self, states: th.Tensor, actions: th.Tensor, next_states: th.Tensor) -> th.Tensor:
        """
        Reward of one step, in the units of the environment (before ``reward_scale`` and ``VecNormalize``).

        :param states: states before the step, ``(B, S)``
        :param actions: actions in the units of the environment, ``(B, A)``
        :param next_states: states after the step, ``(B, S)``
        :return: rewards, ``(B, 1)``
        """
        raise NotImplementedError(f"{type(self).__name__} must implement reward(states, actions, next_states) -> (B, 1)")

    def step(self, states: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        One step of dynamics and reward. Override it only if both share work. (A learned correction calls
        :meth:`transition` and :meth:`reward` instead, because it corrects the state in between.)

        :param states: states, ``(B, S)``
        :param actions: actions in the units of the environment, ``(B, A)``
        :return: next states, ``(B, S)``, and rewards, ``(B, 1)``
        """
        next_states = self.transition(states, actions)
        return next_states, self.reward(states, actions, next_states)

    def terminal(self, states: th.Tensor) -> th.Tensor:
        """
        Whether an episode *terminates* in a state, so that no reward and no value follows.
        States in which the environment truncates an episode are not terminal.

        :param states: states, ``(B, S)``
        :return: booleans, ``(B, 1)``; by default no state is terminal
        """
        return th.zeros(states.shape[0], 1, dtype=th.bool, device=states.device)

    def termination_probability(self, states: th.Tensor) -> th.Tensor:
        """
        The probability that an episode terminates in a state, which rollouts use. By default it follows from
        :meth:`terminal` and is 0 or 1, with a derivative of zero. Override it for probabilities that are known to be smooth.

        :param states: states, ``(B, S)``
        :return: probabilities, ``(B, 1)``
        """
        return self.terminal(states).to(states.dtype)

    @property
    def may_terminate(self) -> bool:
        """
        Whether any state can be terminal. Rollouts of models that never terminate are cheaper.
        By default it is true if :meth:`terminal` is overridden. Override it when that depends on an argument of the model.
        """
        return type(self).terminal is not PriorModel.terminal

    def observation(self, states: th.Tensor) -> th.Tensor:
        """
        What the environment shows of a state. By default, all of it.

        :param states: states, ``(B, S)``
        :return: observations, ``(B, O)``
        """
        return states

    def state_from_observation(self, observations: th.Tensor) -> th.Tensor:
        """
        The state that an observation describes; the inverse of :meth:`observation`. By default, the observation itself.

        :param observations: observations, ``(B, O)``
        :return: states, ``(B, S)``
        """
        return observations

    def state_difference(self, states: th.Tensor, others: th.Tensor) -> th.Tensor:
        """
        The difference between states, which prediction errors and learned corrections are measured in. By default
        ``states - others``. Override it, and :meth:`state_add` if need be, for angles and other periodic states, whose
        difference is the shortest way around.

        :param states: states, ``(B, S)``
        :param others: states, ``(B, S)``
        :return: differences, ``(B, S)``
        """
        return states - others

    def state_add(self, states: th.Tensor, differences: th.Tensor) -> th.Tensor:
        """
        The inverse of :meth:`state_difference`: the states with a given difference to others. By default the sum.

        :param states: states, ``(B, S)``
        :param differences: differences, ``(B, S)``
        :return: states, ``(B, S)``
        """
        return states + differences
