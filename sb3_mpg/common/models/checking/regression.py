"""Regressions that show what errors depend on."""

import numpy as np

# Cosines of each input in the regression of errors
N_COSINES = 4
N_NEIGHBOURS = 4
# More rows take longer and tell no more
MAX_ROWS = 2000
# Rows of consecutive steps resemble each other: whole blocks of them are held out
BLOCK_LENGTH = 16
# A regression needs this many rows for each factor
ROWS_FOR_EACH_FACTOR = 4


def regress(targets: np.ndarray, inputs: np.ndarray, n_factors: int = 0) -> tuple[float, float]:
    """
    :param targets: ``(B,)``
    :param inputs: ``(B,)``, not constant
    :param n_factors: number of factors that were fitted to both before, see :func:`without_explained`
    :return: the slope of the regression of the targets on the inputs, and its standard error
    """
    targets, inputs = targets - targets.mean(), inputs - inputs.mean()
    power = float(inputs @ inputs)
    slope = float(inputs @ targets) / power
    rest = targets - slope * inputs
    return slope, float(np.sqrt(rest @ rest / max(len(rest) - 2 - n_factors, 1) / power))


def without_explained(targets: np.ndarray, inputs: np.ndarray) -> tuple[np.ndarray, int]:
    """
    :param targets: ``(B, n)``
    :param inputs: ``(B, m)``
    :return: what least squares (linear and quadratic, where there are enough rows) leave of the targets, and the number of
        their factors
    """
    sets = (features for features in _feature_sets(inputs)[-3:] if ROWS_FOR_EACH_FACTOR * features.shape[1] <= len(inputs))
    features = next(sets, np.ones((len(inputs), 1)))
    return targets - features @ np.linalg.lstsq(features, targets, rcond=1e-6)[0], features.shape[1]


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """
    :param first: ``(B,)``
    :param second: ``(B,)``
    :return: their correlation, zero if one of them is constant
    """
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def explained_shares(targets: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """
    How far targets are a function of some inputs. Least squares (linear, with cosines of each input, quadratic) and nearest
    neighbours predict one half of the rows from the other half, and the best one counts: with many factors a regression also
    fits the noise of the first half, and finds less than there is.

    :param targets: ``(B, n)``
    :param inputs: ``(B, m)``
    :return: share of the variance of each target that the function explains, from 0 to 1, ``(n,)``: all of it if the target
        is constant; NaN if there are too few rows to tell
    """
    rows = np.linspace(0, len(inputs) - 1, min(len(inputs), MAX_ROWS)).astype(int)
    targets, inputs, n_rows = targets[rows], inputs[rows], len(rows)
    feature_sets = [features for features in _feature_sets(inputs) if ROWS_FOR_EACH_FACTOR * features.shape[1] <= n_rows]
    if not feature_sets:
        return np.full(targets.shape[1], np.nan)
    is_fitted = np.arange(n_rows) // min(BLOCK_LENGTH, max(n_rows // 4, 1)) % 2 == 0
    fitted, held_out = targets[is_fitted], targets[~is_fitted]
    varies = np.ptp(inputs, axis=0) > 0
    scaled = inputs[:, varies] / inputs[:, varies].std(axis=0)
    predictions = [
        features[~is_fitted] @ np.linalg.lstsq(features[is_fitted], fitted, rcond=1e-6)[0] for features in feature_sets
    ]
    predictions.append(_of_neighbours(scaled[is_fitted], fitted, scaled[~is_fitted]))
    # Rounding errors of a constant are no variance
    variances = np.maximum(held_out.var(axis=0), 1e-6 * (held_out**2).mean(axis=0) + 1e-300)
    shares = [1 - ((held_out - predicted) ** 2).mean(axis=0) / variances for predicted in predictions]
    return np.clip(np.max(shares, axis=0), 0.0, 1.0)


def _of_neighbours(inputs: np.ndarray, targets: np.ndarray, at: np.ndarray) -> np.ndarray:
    """
    :param inputs: ``(B, m)``
    :param targets: ``(B, n)``
    :param at: other inputs, ``(C, m)``
    :return: mean targets of the nearest neighbours of the other inputs, the nearer ones counting more, ``(C, n)``
    """
    squares = (at**2).sum(axis=1)[:, None] + (inputs**2).sum(axis=1) - 2 * at @ inputs.T
    nearest = np.argpartition(squares, N_NEIGHBOURS, axis=1)[:, :N_NEIGHBOURS]
    weights = 1 / (np.take_along_axis(squares, nearest, axis=1).clip(min=0.0) + 1e-12)
    return (targets[nearest] * weights[..., None]).sum(axis=1) / weights.sum(axis=1, keepdims=True)


def _feature_sets(inputs: np.ndarray) -> list[np.ndarray]:
    """
    :param inputs: ``(B, m)``
    :return: features of the inputs, in several sets, each ``(B, n_features)``
    """
    low, width = inputs.min(axis=0), np.ptp(inputs, axis=0)
    scaled = np.where(width > 0, (inputs - low) / np.maximum(width, 1e-300), 0.0)
    linear = np.concatenate([np.ones((len(inputs), 1)), scaled - 0.5], axis=1)
    cosines = [np.cos(np.pi * order * scaled) for order in range(1, N_COSINES + 1)]
    additive = np.concatenate([linear, *cosines], axis=1)
    n_inputs = inputs.shape[1]
    if n_inputs**2 > len(inputs):
        return [additive, linear]
    first, second = np.triu_indices(n_inputs)
    products = (scaled[:, first] - 0.5) * (scaled[:, second] - 0.5)
    return [np.concatenate([additive, products], axis=1), np.concatenate([linear, products], axis=1), additive, linear]
