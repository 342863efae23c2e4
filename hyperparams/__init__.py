"""Tuned hyperparameters, one YAML file per algorithm, in the format of RL Zoo; installed as ``sb3_mpg.hyperparams``."""
