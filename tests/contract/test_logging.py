"""Loggers and the folders that they write to."""

import numpy as np
import pytest
from stable_baselines3.common import logger as sb3_logger
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import (
    CSVOutputFormat,
    HParam,
    HumanOutputFormat,
    TensorBoardOutputFormat,
    configure,
)


class Writer:
    """TensorBoard's writer without TensorBoard, which the tests do not need otherwise."""

    def __init__(self, log_dir):
        self.log_dir, self.steps, self.hparams = log_dir, {}, []
        self.file_writer = self

    def add_scalar(self, key, value, step):
        assert np.isfinite(value), key
        self.steps.setdefault(key, []).append(step)

    def add_summary(self, summary):
        self.hparams.append(summary)

    def flush(self):
        pass

    def close(self):
        pass


@pytest.fixture
def tensorboard(monkeypatch):
    monkeypatch.setattr(sb3_logger, "SummaryWriter", Writer)
    monkeypatch.setattr("stable_baselines3.common.utils.SummaryWriter", Writer)
    monkeypatch.setattr(
        sb3_logger, "hparams", lambda hparam_dict, metric_dict: (hparam_dict, metric_dict, None), raising=False
    )


class Hyperparameters(BaseCallback):
    def _on_training_start(self):
        values = {"algorithm": type(self.model).__name__, "gamma": self.model.gamma}
        self.logger.record("hparams", HParam(values, {"rollout/ep_len_mean": 0}), exclude=("stdout", "log", "json", "csv"))

    def _on_step(self):
        return True


def test_folders_of_runs(any_case, tmp_path, tensorboard):
    name = any_case.cls.__name__
    model = any_case.make(any_case.env(max_steps=4), tensorboard_log=str(tmp_path))
    model.learn(24, callback=Hyperparameters(), log_interval=2)
    (output,) = model.logger.output_formats
    assert output.writer.hparams[0] == {"algorithm": name, "gamma": model.gamma}
    model.learn(16, reset_num_timesteps=False, log_interval=2)
    # The run goes on in its folder
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}_1"}
    (output,) = model.logger.output_formats
    steps = output.writer.steps
    assert steps["rollout/ep_rew_mean"] == steps["train/critic_loss"] == [32, 40]
    # The number of updates is left out, as SB3 does
    assert "train/n_updates" not in steps
    for _ in range(2):
        model.learn(4, tb_log_name="other")
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}_1", "other_1", "other_2"}


def test_outputs(case, tmp_path, tensorboard, monkeypatch):
    def outputs(model):
        return [type(output) for output in model.logger.output_formats]

    folder = str(tmp_path)
    assert outputs(case.make(verbose=0).learn(2)) == []
    assert outputs(case.make(verbose=1).learn(2)) == [HumanOutputFormat]
    model = case.make(verbose=0, tensorboard_log=folder).learn(2)
    assert outputs(model) == [TensorBoardOutputFormat] and model.logger.dir.startswith(folder)
    model = case.make(verbose=1, tensorboard_log=folder).learn(2)
    assert outputs(model) == [HumanOutputFormat, TensorBoardOutputFormat]
    monkeypatch.setenv("SB3_LOGDIR", str(tmp_path / "elsewhere"))
    assert case.make(verbose=0).learn(2).logger.dir == str(tmp_path / "elsewhere")


def test_a_logger_of_the_user_stays(case, tmp_path):
    logger = configure(str(tmp_path), ["stdout", "csv"])
    for model in (case.make(verbose=1), case.make(verbose=1).learn(2)):
        model.set_logger(logger)
        model.learn(14, log_interval=1)
        assert model.logger is logger
        assert [type(output) for output in logger.output_formats] == [HumanOutputFormat, CSVOutputFormat]
    logger.close()


def test_what_is_printed(case, capsys):
    case.make(case.env(max_steps=4), verbose=1).learn(20, log_interval=1)
    output = capsys.readouterr().out
    for key in ("ep_len_mean", "ep_rew_mean", "total_timesteps", "actor_loss", "critic_loss", "n_updates"):
        assert f" {key} " in output, key
