"""How far a model may be wrong about where episodes terminate."""

# Largest share of terminations, or of other steps, at which a model may be wrong
MAX_MISJUDGED_ENDS = 0.5
# Missed terminations are ignored if they would occur in less than this share of the rollouts
MATTERING_ENDS = 0.1


def ends_matter(termination_rate: float, horizon: int) -> bool:
    """
    :param termination_rate: terminations for each step
    :param horizon: number of model steps of rollouts
    :return: whether terminations are frequent enough to matter within a rollout
    """
    return termination_rate * horizon > MATTERING_ENDS
