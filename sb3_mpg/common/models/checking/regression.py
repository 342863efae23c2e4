"""Regressions that show what errors depend on."""

import numpy as np

# Cosines of each input in the regression of errors
N_COSINES = 4
# Rows of consecutive steps resemble each other: whole blocks of them are held out
BLOCK_LENGTH = 16
# A regression needs this many rows for each factor
ROWS_FOR_EACH_FACTOR = 4


def regress(targets: np.ndarray, inputs: np.ndarray) -> tuple[float, float]:
    """
    :param targets: ``(B,)``
    :param inputs: ``(B,)``, not constant
    :return: the slope of the regression of the targets on the inputs, and its standard error
    """
    targets, inputs = targets - targets.mean(), inputs - inputs.mean()
    power = float(inputs @ inputs)
    slope = float(inputs @ targets) / power
    rest = targets - slope * inputs
    return slope, float(np.sqrt(rest @ rest / max(len(rest) - 2, 1) / power))


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
    How far targets are a function of some inputs: quadratic, with cosines of each input if there are enough rows. It is
    fitted to one half of the rows and evaluated on the other half.

    :param targets: ``(B, n)``
    :param inputs: ``(B, m)``
    :return: share of the mean square of each target that the function explains, from 0 to 1, ``(n,)``; NaN if there are too
        few rows to tell
    """
    n_rows = len(inputs)
    features = next((f for f in _feature_sets(inputs) if ROWS_FOR_EACH_FACTOR * f.shape[1] <= n_rows), None)
    if features is None:
        return np.full(targets.shape[1], np.nan)
    is_fitted = np.arange(n_rows) // min(BLOCK_LENGTH, max(n_rows // 4, 1)) % 2 == 0
    factors = np.linalg.lstsq(features[is_fitted], targets[is_fitted], rcond=1e-6)[0]
    rest = targets[~is_fitted] - features[~is_fitted] @ factors
    power = np.maximum((targets[~is_fitted] ** 2).mean(axis=0), 1e-300)
    return np.clip(1 - (rest**2).mean(axis=0) / power, 0.0, 1.0)


def _feature_sets(inputs: np.ndarray) -> list[np.ndarray]:
    """
    :param inputs: ``(B, m)``
    :return: features of the inputs, the most first, each ``(B, n_features)``
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
