"""Functions that are solved for by least squares."""

import torch as th
from torch import nn

# With fewer rows for each factor, least squares fit the noise
MIN_ROWS_PER_FACTOR = 5
# Ridge regularisation, relative to the squares of each regressor: makes linearly dependent regressors solvable
RIDGE = 1e-8


class LeastSquares(nn.Module):
    """
    An affine function, solved for by least squares. It is zero until there are enough rows.

    :param n_inputs: number of inputs
    :param n_outputs: number of outputs
    """

    factors: th.Tensor

    def __init__(self, n_inputs: int, n_outputs: int):
        super().__init__()
        # The first row holds the constants
        self.register_buffer("factors", th.zeros(1 + n_inputs, n_outputs))

    def forward(self, inputs: th.Tensor) -> th.Tensor:
        """
        :param inputs: ``(B, n_inputs)``
        :return: ``(B, n_outputs)``
        """
        return self.factors[0] + inputs @ self.factors[1:]

    def can_be_solved(self, n_rows: int) -> bool:
        """
        :param n_rows: number of rows of data
        :return: whether they are enough
        """
        return n_rows >= MIN_ROWS_PER_FACTOR * len(self.factors)

    def solve(self, inputs: th.Tensor, targets: th.Tensor) -> None:
        """
        Solve for the factors. They become zero if there are not enough rows.

        :param inputs: finite, ``(B, n_inputs)``
        :param targets: finite, ``(B, n_outputs)``
        """
        if not self.can_be_solved(len(inputs)):
            self.factors.zero_()
            return
        regressors = th.cat([th.ones_like(inputs[:, :1]), inputs], dim=1).double()
        gram = regressors.T @ regressors
        gram.diagonal().mul_(1 + RIDGE).add_(1e-12)
        self.factors.copy_(th.linalg.solve(gram, regressors.T @ targets.double()).to(inputs.dtype))


class QuadraticReward(nn.Module):
    """
    A reward that is a weighted sum of some values and of their squares, with a bonus or penalty where an episode terminates.
    Both are solved for; the second is the mean of what the first leaves over in terminal states.

    :param n_values: number of values
    """

    terminal_reward: th.Tensor

    def __init__(self, n_values: int):
        super().__init__()
        self.quadratic = LeastSquares(2 * n_values, 1)
        self.register_buffer("terminal_reward", th.zeros(1))

    @staticmethod
    def _with_squares(values: th.Tensor) -> th.Tensor:
        """
        :param values: ``(B, n_values)``
        :return: the values and their squares, ``(B, 2 n_values)``
        """
        return th.cat([values, values.square()], dim=1)

    def forward(self, values: th.Tensor, is_terminal: th.Tensor | None) -> th.Tensor:
        """
        :param values: ``(B, n_values)``
        :param is_terminal: whether an episode terminates there, bool ``(B, 1)``; ``None`` if it never does
        :return: rewards, ``(B, 1)``
        """
        rewards = self.quadratic(self._with_squares(values))
        return rewards if is_terminal is None else rewards + th.where(is_terminal, self.terminal_reward, 0.0)

    def solve(self, values: th.Tensor, rewards: th.Tensor, is_terminal: th.Tensor | None) -> None:
        """
        :param values: finite, ``(B, n_values)``
        :param rewards: finite, ``(B, 1)``
        :param is_terminal: as in :meth:`forward`
        """
        regressors = self._with_squares(values)
        ends = th.zeros_like(rewards[:, 0], dtype=th.bool) if is_terminal is None else is_terminal.squeeze(1)
        self.quadratic.solve(regressors[~ends], rewards[~ends])
        self.terminal_reward.zero_()
        if ends.any():
            self.terminal_reward.copy_((rewards[ends] - self.quadratic(regressors[ends])).mean(dim=0))
