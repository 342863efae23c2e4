"""Settings of algorithms that learn within a second."""

from sb3_mpg import MPG, NStepADP, NStepDPG

# A smaller discount factor makes plans shorter
SMALL = {
    "gamma": 0.9,
    "policy_kwargs": {"net_arch": [16]},
    "learning_starts": 40,
    "batch_size": 32,
    "seed": 0,
    "buffer_size": 2000,
}
PAPERS = {"weighting": "rule_based", "residual": False}
ALGORITHMS = {
    "v1": (
        MPG,
        {"value_target": "n_step_simulator", "value_target_kwargs": {"n_steps": 4}, "batch_reuse": 2, "horizons": (0, 3)},
    ),
    "v2": (MPG, {"horizons": (0, 2, 5), **PAPERS}),
    "measured": (MPG, {"horizons": (0, 2, 5)}),
    "compared": (MPG, {"horizons": (0, 5), "residual": False}),
    "replay": (MPG, {"horizons": (3,), "weighting": "constant", "value_target": "n_step_replay"}),
    "geometric": (MPG, {"horizons": (0, 1, 3), "weighting": "geometric", "differentiate": "all_actions"}),
    "ndpg": (NStepDPG, {"n_steps": 3}),
    "nadp": (NStepADP, {"n_steps": 3}),
}
