"""Functions that are solved for by least squares."""

import torch as th
from torch import nn

# With fewer rows for each factor, least squares fit the noise
MIN_ROWS_PER_FACTOR = 5
# Ridge regularisation, relative to the squares of each regressor: makes linearly dependent regressors solvable
RIDGE = 1e-8
# Number of parts of the data, each of which is predicted from the others
N_FOLDS = 5


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
        Solve for the factors. They become zero if there are not enough rows. So do those of each output that they would
        predict worse than zeros: a few extreme targets have a large influence on all factors.

        :param inputs: finite, ``(B, n_inputs)``, neighbouring rows may be similar
        :param targets: finite, ``(B, n_outputs)``
        """
        self.factors.zero_()
        if not self.can_be_solved(len(inputs)):
            return
        regressors = th.cat([th.ones_like(inputs[:, :1]), inputs], dim=1).double()
        targets = targets.double()
        parts = [*zip(regressors.chunk(N_FOLDS), targets.chunk(N_FOLDS), strict=True)]
        grams = [part.T @ part for part, _ in parts]
        moments = [part.T @ wanted for part, wanted in parts]
        gram, moment = th.stack(grams).sum(dim=0), th.stack(moments).sum(dim=0)
        errors, errors_of_zero = th.zeros_like(targets[0]), th.zeros_like(targets[0])
        for (part, wanted), own_gram, own_moment in zip(parts, grams, moments, strict=True):
            # Absolute errors, because squares would say how well the most extreme targets are predicted
            errors += (wanted - part @ _solution(gram - own_gram, moment - own_moment)).abs().sum(dim=0)
            errors_of_zero += wanted.abs().sum(dim=0)
        factors = _solution(gram, moment)
        self.factors.copy_(th.where(errors < errors_of_zero, factors, 0.0).to(inputs.dtype))


def _solution(gram: th.Tensor, moment: th.Tensor) -> th.Tensor:
    """
    :param gram: products of the regressors with each other, ``(n, n)``
    :param moment: products of the regressors with the targets, ``(n, n_outputs)``
    :return: factors of the regressors, ``(n, n_outputs)``
    """
    gram = gram.clone()
    gram.diagonal().mul_(1 + RIDGE).add_(1e-12)
    return th.linalg.solve(gram, moment)


class QuadraticReward(nn.Module):
    """
    A reward that is a weighted sum of some values and of their squares, solved for by least squares.

    :param n_values: number of values
    """

    def __init__(self, n_values: int):
        super().__init__()
        self.quadratic = LeastSquares(2 * n_values, 1)

    @staticmethod
    def _with_squares(values: th.Tensor) -> th.Tensor:
        """
        :param values: ``(B, n_values)``
        :return: the values and their squares, ``(B, 2 n_values)``
        """
        return th.cat([values, values.square()], dim=1)

    def forward(self, values: th.Tensor) -> th.Tensor:
        """
        :param values: ``(B, n_values)``
        :return: rewards, ``(B, 1)``
        """
        return self.quadratic(self._with_squares(values))

    def solve(self, values: th.Tensor, rewards: th.Tensor) -> None:
        """
        :param values: finite, ``(B, n_values)``
        :param rewards: finite, ``(B, 1)``
        """
        self.quadratic.solve(self._with_squares(values), rewards)


class EndRewards(nn.Module):
    """
    Bonus or penalty where an episode ends, solved for. The model's own rewards may know it, but pay it in the wrong states,
    and jump there.
    """

    found: th.Tensor
    jump: th.Tensor
    own_jump: th.Tensor

    def __init__(self) -> None:
        super().__init__()
        # What the model's rewards lack where it claims an end
        self.register_buffer("found", th.zeros(()))
        # By how much rewards change where an episode ends, and by how much the model's own change where it claims that
        self.register_buffer("jump", th.zeros(()))
        self.register_buffer("own_jump", th.zeros(()))

    @staticmethod
    def solve(value: th.Tensor, rewards: th.Tensor, is_case: th.Tensor) -> None:
        """
        :param value: one of the buffers
        :param rewards: rewards that it stands for, ``(B, 1)``
        :param is_case: which of them, bool ``(B, 1)``. The value is their median, or 0 if there are none.
        """
        is_case = is_case & th.isfinite(rewards)
        value.copy_(rewards[is_case].median() if is_case.any() else th.zeros_like(value))
