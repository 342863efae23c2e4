"""Evaluation in a process of its own."""

import copy
import io
import warnings
import weakref
from collections import deque
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import cloudpickle
import gymnasium as gym
import numpy as np
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback, EventCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.vec_env import (
    SubprocVecEnv,
    VecEnv,
    VecEnvWrapper,
    VecNormalize,
    sync_envs_normalization,
)

from sb3_mpg.common.env_pickles import pickle_with_env, put_env_together, take_env_apart
from sb3_mpg.common.files import write_whole
from sb3_mpg.common.processes import (
    NO_MAIN_GUARD,
    NO_MAIN_GUARD_MESSAGE,
    Failure,
    Ready,
    SharedBytes,
    Worker,
    exit_without_main_guard,
    process_context,
)
from sb3_mpg.common.spaces import check_kind_of_env, shape_of, wrap_env

# Seconds that the evaluator may take to close its environment, which may write a video
CLOSE_SECONDS = 60.0


class Snapshot(NamedTuple):
    """
    A policy that is evaluated.

    :param num_timesteps: number of environment steps at which the snapshot was taken
    :param parameters: state of the policy, and the statistics of each ``VecNormalize``, pickled
    :param model: the file that ``save`` writes, ``None`` if the best model is not saved
    """

    num_timesteps: int
    parameters: bytes
    model: bytes | None


class Evaluation(NamedTuple):
    """
    Results of an evaluation.

    :param rewards: return of each episode
    :param lengths: number of steps of each episode
    :param successes: whether each episode succeeded; empty if the environment does not report it
    """

    rewards: list[float]
    lengths: list[int]
    successes: list[bool]


def normalizations(env: VecEnv) -> list[VecNormalize]:
    """
    :param env: an environment
    :return: its ``VecNormalize`` wrappers, the outermost first
    """
    found = []
    while isinstance(env, VecEnvWrapper):
        if isinstance(env, VecNormalize):
            found.append(env)
        env = env.venv
    return found


def run_evaluator(connection: Connection, payload: SharedBytes) -> None:
    """
    Main function of the evaluator process: receive snapshots and return evaluations, until the connection is closed.

    :param connection: connection to the callback
    :param payload: policy, environment and settings, pickled
    """
    policy, env_parts, settings = payload.load()
    env = put_env_together(*env_parts)
    try:
        connection.send(Ready())
        evaluate_snapshots(connection, policy, env, settings)
    finally:
        # Wrappers write what they have recorded
        env.close()


def evaluate_snapshots(connection: Connection, policy: BasePolicy, env: VecEnv, settings: dict[str, Any]) -> NoReturn:
    """
    :param connection: connection to the callback, which ends this by closing it
    :param policy: the policy, which gets the parameters of the snapshots
    :param env: the environment
    :param settings: arguments of ``evaluate_policy``
    """
    while True:
        message: bytes = connection.recv()
        state_dict, statistics = cloudpickle.loads(message)
        policy.load_state_dict(state_dict)
        for normalization, values in zip(normalizations(env), statistics, strict=True):
            vars(normalization).update(values)
        successes: list[bool] = []

        def note_success(locals_: dict[str, Any], globals_: dict[str, Any], successes: list[bool] = successes) -> None:
            if locals_["done"] and locals_["info"].get("is_success") is not None:
                successes.append(locals_["info"]["is_success"])

        rewards, lengths = evaluate_policy(policy, env, return_episode_rewards=True, callback=note_success, **settings)
        connection.send(Evaluation(rewards, lengths, successes))  # type: ignore[arg-type]


class AsyncEvalCallback(EvalCallback):
    """
    SB3's ``EvalCallback`` that runs the episodes in a separate process, the evaluator, while training continues.

    A snapshot of the policy and of the statistics of ``VecNormalize`` is evaluated. Its results are logged, saved and printed
    for the step at which the snapshot was taken. This happens as soon as the results arrive; pending evaluations are completed
    when training ends. ``best_model.zip`` is the algorithm at that step. The callbacks on a new best model and after an
    evaluation run when the results arrive.

    One snapshot may wait while another is evaluated; training waits before there are more. If the evaluator dies, its
    evaluation is missing, and the next evaluation starts a new process.

    The evaluator writes the files of ``Monitor`` and of recorded videos. It closes its environment when training ends.

    :param eval_env: The environment used for evaluation, which is copied to the evaluator; not a ``SubprocVecEnv``

    The other parameters are those of ``EvalCallback``.

    :raises TypeError: for a vector environment of Gymnasium
    :raises ValueError: for a ``SubprocVecEnv``; before the first step, when environment or policy cannot be pickled, or when
        the environment has other spaces than that of the training
    """

    def __init__(
        self,
        eval_env: gym.Env | VecEnv,
        callback_on_new_best: BaseCallback | None = None,
        callback_after_eval: BaseCallback | None = None,
        n_eval_episodes: int = 5,
        eval_freq: int = 10000,
        log_path: str | None = None,
        best_model_save_path: str | None = None,
        deterministic: bool = True,
        render: bool = False,
        verbose: int = 1,
        warn: bool = True,
    ):
        check_kind_of_env(eval_env)
        super().__init__(
            eval_env,
            callback_on_new_best,
            callback_after_eval,
            n_eval_episodes,
            eval_freq,
            log_path,
            best_model_save_path,
            deterministic,
            render,
            verbose,
            warn,
        )
        # A tuple of observations becomes a dictionary, as in training
        self.eval_env = wrap_env(self.eval_env)
        if isinstance(take_env_apart(self.eval_env)[1], SubprocVecEnv):
            raise ValueError(
                "The environment of an AsyncEvalCallback is copied to a process of its own and cannot be a SubprocVecEnv: "
                "use a DummyVecEnv."
            )
        self._worker: Worker | None = None
        self._last_resort: weakref.finalize | None = None
        self._is_ready = False
        self._running: Snapshot | None = None
        self._waiting: deque[Snapshot] = deque()

    def __getstate__(self) -> dict[str, Any]:
        # A copy starts an evaluator of its own, which evaluates again what the present one has not finished
        unfinished = deque([*([] if self._running is None else [self._running]), *self._waiting])
        state = {**vars(self), "_worker": None, "_is_ready": False, "_running": None, "_waiting": unfinished}
        # The variables of `learn`, which cannot be pickled
        state = {**state, "_last_resort": None, "locals": {}, "globals": {}}
        return {**state, "eval_env": take_env_apart(self.eval_env)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, eval_env=put_env_together(*state["eval_env"]))

    def _init_callback(self) -> None:
        exit_without_main_guard()
        # Fail before the first step
        for name in ("observation_space", "action_space"):
            shape, expected = (shape_of(getattr(owner, name)) for owner in (self.eval_env, self.model))
            if shape != expected:
                raise ValueError(
                    f"The {name} of the evaluation has the shape {shape}, that of the algorithm {expected}: evaluate in an "
                    "environment with the spaces of the training."
                )
        super()._init_callback()
        self._pickled_content()

    def _pickled_content(self) -> bytes:
        """
        :return: what the evaluator gets
        :raises ValueError: when environment or policy cannot be pickled
        """
        # The evaluator runs on the CPU, whatever the device of training
        policy = copy.deepcopy(self.model.policy).to("cpu")
        for module in policy.modules():
            if hasattr(module, "optimizer"):
                module.optimizer = None  # type: ignore[assignment]  # not needed, and not moved by `to`
        settings = {
            "n_eval_episodes": self.n_eval_episodes,
            "render": self.render,
            "deterministic": self.deterministic,
            "warn": self.warn,
        }
        try:
            return pickle_with_env((policy, take_env_apart(self.eval_env), settings))
        except Exception as error:
            raise ValueError(
                f"The environment or the policy cannot be sent to the evaluator ({type(error).__name__}: {error}); "
                "use SB3's EvalCallback."
            ) from error

    def _start(self) -> None:
        content = SharedBytes(self._pickled_content())
        self._worker = Worker(process_context(), run_evaluator, (content,), "evaluator")
        # SB3's own algorithms do not call `on_training_end` when training ends in an exception
        self._last_resort = weakref.finalize(self, self._worker.close)
        self._last_resort.atexit = False
        self._is_ready = False

    def _take_snapshot(self) -> Snapshot:
        # Sync training and eval env if there is VecNormalize
        if self.model.get_vec_normalize_env() is not None:
            try:
                sync_envs_normalization(self.training_env, self.eval_env)
            except AttributeError as error:
                raise AssertionError(
                    "Training and eval env are not wrapped the same way, "
                    "see https://stable-baselines3.readthedocs.io/en/master/guide/callbacks.html#evalcallback "
                    "and warning above."
                ) from error
        statistics = [
            {name: value for name, value in vars(normalization).items() if name in ("obs_rms", "ret_rms")}
            for normalization in normalizations(self.eval_env)
        ]
        state_dict = {name: tensor.cpu() for name, tensor in self.model.policy.state_dict().items()}
        file = None
        if self.best_model_save_path is not None:
            file = io.BytesIO()
            self.model.save(file)
        parameters = cloudpickle.dumps((state_dict, statistics))
        return Snapshot(self.num_timesteps, parameters, None if file is None else file.getvalue())

    def _on_step(self) -> bool:
        continue_training = True
        if self.eval_freq > 0 and self.n_calls % self.eval_freq == 0:
            self._waiting.append(self._take_snapshot())
            continue_training = self._proceed()
            # At most one snapshot waits
            while self._running is not None and len(self._waiting) > 1:
                continue_training = self._proceed(timeout=1.0) and continue_training
        return self._proceed() and continue_training

    def _proceed(self, timeout: float = 0.0) -> bool:
        """
        Receive results, and send the next snapshot to the evaluator.

        :param timeout: how long to wait for the evaluator, in seconds
        :return: whether to continue training
        """
        continue_training = True
        if self._worker is None and self._waiting:
            self._start()
        if self._worker is None:
            return continue_training
        try:
            # Receive messages
            wait([self._worker.connection, self._worker.process.sentinel], timeout)
            while self._worker is not None and self._worker.connection.poll():
                continue_training = self._take(self._worker.connection.recv()) and continue_training
            if self._worker is None:
                return continue_training
            # Send the next snapshot
            if self._is_ready and self._running is None and self._waiting:
                self._running = self._waiting.popleft()
                self._worker.connection.send(self._running.parameters)
            died = not self._worker.is_alive()
        except (EOFError, OSError):
            died = True
        if died:
            self._report_death(self._worker)
        return continue_training

    def _report_death(self, worker: Worker) -> None:
        """
        Warn that the evaluator died. The evaluation that it ran, or was started for, is missing.

        :param worker: the evaluator
        :raises RuntimeError: when the main script has no guard
        """
        if self._running is None and self._waiting:
            self._running = self._waiting.popleft()
        lost = "" if self._running is None else f" The evaluation of step {self._running.num_timesteps} is missing."
        code = worker.exit_code()
        self.close(keep_waiting=True)
        if code == NO_MAIN_GUARD:
            raise RuntimeError(NO_MAIN_GUARD_MESSAGE)
        warnings.warn(f"The evaluator died with exit code {code}; the next evaluation starts it again.{lost}")

    def _take(self, message: Ready | Evaluation | Failure) -> bool:
        """
        :param message: message of the evaluator
        :return: whether to continue training
        :raises Exception: the exception of the evaluator, if it failed
        """
        if isinstance(message, Ready):
            self._is_ready = True
            return True
        if isinstance(message, Failure):
            self.close()
            message.reraise()
        assert self._running is not None
        snapshot, self._running = self._running, None
        return self._report(snapshot, message)

    def _report(self, snapshot: Snapshot, evaluation: Evaluation) -> bool:
        """
        Save, print and log results, and trigger callbacks, as ``EvalCallback`` does.

        :param snapshot: the evaluated snapshot
        :param evaluation: its results
        :return: whether to continue training
        """
        continue_training = True
        # Save the results of all evaluations
        if self.log_path is not None:
            self.evaluations_timesteps.append(snapshot.num_timesteps)
            self.evaluations_results.append(evaluation.rewards)
            self.evaluations_length.append(evaluation.lengths)
            successes = {}
            if evaluation.successes:
                self.evaluations_successes.append(evaluation.successes)
                successes = {"successes": self.evaluations_successes}
            np.savez(
                self.log_path,
                timesteps=self.evaluations_timesteps,
                results=self.evaluations_results,
                ep_lengths=self.evaluations_length,
                **successes,  # type: ignore[arg-type]
            )

        # Print and log
        mean_reward, std_reward = float(np.mean(evaluation.rewards)), float(np.std(evaluation.rewards))
        mean_length, std_length = np.mean(evaluation.lengths), np.std(evaluation.lengths)
        self.last_mean_reward = mean_reward
        values = {"eval/mean_reward": mean_reward, "eval/mean_ep_length": mean_length}
        if self.verbose >= 1:
            print(f"Eval num_timesteps={snapshot.num_timesteps}, episode_reward={mean_reward:.2f} +/- {std_reward:.2f}")
            print(f"Episode length: {mean_length:.2f} +/- {std_length:.2f}")
        if evaluation.successes:
            values["eval/success_rate"] = success_rate = float(np.mean(evaluation.successes))
            if self.verbose >= 1:
                print(f"Success rate: {100 * success_rate:.2f}%")
        self._log(snapshot.num_timesteps, values)

        # Save the best model
        if mean_reward > self.best_mean_reward:
            if self.verbose >= 1:
                print("New best mean reward!")
            if self.best_model_save_path is not None and snapshot.model is not None:
                write_whole(Path(self.best_model_save_path) / "best_model.zip", snapshot.model)
            self.best_mean_reward = mean_reward
            # Trigger callback on new best model, if needed
            if self.callback_on_new_best is not None:
                continue_training = self.callback_on_new_best.on_step()
        # Trigger callback after every evaluation, if needed
        if self.callback is not None:
            continue_training = continue_training and self._on_event()
        return continue_training

    def _log(self, num_timesteps: int, values: dict[str, Any]) -> None:
        """
        Write to the log for an earlier step. The values recorded for the current step are kept.

        :param num_timesteps: the step
        :param values: values to log
        """
        names = ("name_to_value", "name_to_count", "name_to_excluded")
        recorded = {name: dict(getattr(self.logger, name)) for name in names}
        for name in names:
            getattr(self.logger, name).clear()
        for key, value in values.items():
            self.logger.record(key, value)
        self.logger.record("time/total_timesteps", num_timesteps, exclude="tensorboard")
        self.logger.dump(num_timesteps)
        for name in names:
            getattr(self.logger, name).update(recorded[name])

    def _on_training_end(self) -> None:
        while self._running is not None or self._waiting:
            self._proceed(timeout=1.0)
        if self._worker is not None:
            # It closes the environment
            self._worker.close(CLOSE_SECONDS)
        self.close()

    def close(self, keep_waiting: bool = False) -> None:
        """
        End the evaluator. Its unfinished evaluation is lost. Calling it again does nothing.

        :param keep_waiting: whether to keep the snapshots that wait
        """
        if self._last_resort is not None:
            self._last_resort()
        self._worker = self._running = self._last_resort = None
        self._is_ready = False
        if not keep_waiting:
            self._waiting.clear()


def close_evaluators(callback: MaybeCallback) -> None:
    """
    End the evaluator processes of callbacks, also after an exception in training.

    :param callback: argument of ``learn``
    """
    if isinstance(callback, list):
        for member in callback:
            close_evaluators(member)
    elif isinstance(callback, CallbackList):
        close_evaluators(callback.callbacks)
    elif isinstance(callback, EventCallback):
        close_evaluators(callback.callback)
        if isinstance(callback, AsyncEvalCallback):
            callback.close()
