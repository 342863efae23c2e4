"""When a model is fitted, and to what: counted with a model that learns nothing."""

import numpy as np
import pytest
import torch as th
from lq import LinearEnv
from models import LearnedDynamics
from recorded import filled_buffer
from settings import SMALL

from sb3_mpg import MPG
from sb3_mpg.common.model_fitting import ModelFitting
from sb3_mpg.common.models.fitting_schedule import EveryUpdate, UntilConverged
from sb3_mpg.common.models.trainable import TrainableModel
from sb3_mpg.common.saved_object import SavedObject


class Counts(TrainableModel):
    """
    Writes down what it is called with. Its error on held-out steps follows a list, and then stays.

    :param errors: at the first, second, ... look
    """

    n_members = 3

    def __init__(self, errors=(1.0,), shifts=False):
        super().__init__()
        self.errors, self.shifts = list(errors), shifts
        self.calls = []
        self.n_rows = []
        self.held_out = []

    def rescale(self, transitions):
        self.calls.append("rescale")
        self.n_rows.append(len(transitions.rewards))

    def needs_rescaling(self, transitions):
        return self.shifts

    def tune_on_rollouts(self, windows):
        self.calls.append("tune")
        self.n_windows, self.longest = len(windows.lengths), int(windows.lengths.max())

    def fit(self, transitions):
        self.calls.append("fit")
        self.n_rows.append(len(transitions.rewards))
        return float(self.calls.count("fit"))

    def validation_error(self, transitions):
        self.calls.append("look")
        self.held_out.append(transitions)
        return self.errors.pop(0) if len(self.errors) > 1 else self.errors[0]

    def keep_best(self, transitions):
        self.calls.append("keep")
        self.held_out.append(transitions)

    def restore_best(self):
        self.calls.append("restore")

    def learned_state(self):
        return {"calls": list(self.calls)}

    def load_learned_state(self, state):
        if "calls" not in state:
            return False
        self.calls = list(state["calls"])
        return True


class Schedule:
    """What a schedule calls at each update."""

    def __init__(self, schedule):
        self.schedule, self.calls = schedule, []

    def losses(self, n_updates):
        return [
            self.schedule.fit(number, lambda: self.calls.append("once") or 1.0, lambda most: self.calls.append(most) or 2.0)
            for number in range(1, n_updates + 1)
        ]


def test_every_update_takes_one_step():
    run = Schedule(EveryUpdate())
    assert run.losses(7) == [1.0] * 7
    assert run.calls == ["once"] * 7
    later = Schedule(EveryUpdate(later_every=3, n_first=5))
    assert later.losses(10) == [1.0] * 5 + [None, 1.0, None, None, 1.0]
    assert later.calls == ["once"] * 7


@pytest.mark.parametrize("every", [1, 3, 250])
def test_until_converged_once_in_so_many_updates(every):
    run = Schedule(UntilConverged(every, max_fits=77))
    losses = run.losses(2 * every + 1)
    assert [number for number, loss in enumerate(losses, start=1) if loss is not None] == [1, every + 1, 2 * every + 1]
    assert run.calls == [77] * 3


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: EveryUpdate(later_every=0), "later_every"),
        (lambda: UntilConverged(0), "every"),
        (lambda: UntilConverged(max_fits=0), "max_fits"),
    ],
)
def test_a_schedule_that_never_comes_is_refused(make, name):
    with pytest.raises(ValueError, match=f"`{name}` must be a whole number, 1 or more, got 0"):
        make()


class TestConvergence:
    """One look at the error every 5 steps, and 10 steps without a lower error are enough."""

    def n_fits(self, errors, max_fits=2000):
        model = Counts(errors)
        fitting = ModelFitting(model, batch_size=8, check_every=5, patience=10)
        model.fitting_schedule = UntilConverged(1, max_fits)
        loss = fitting.fit(1, filled_buffer())
        assert loss == model.calls.count("fit")
        # The best of what was seen is restored, once
        assert model.calls.count("keep") == model.calls.count("look") and model.calls[-1] == "restore"
        assert len({id(held_out) for held_out in model.held_out}) == 1
        return model.calls.count("fit")

    def test_an_error_that_never_falls(self):
        # Looks after steps 1, 6 and 11, the last of which is 10 steps behind the best
        assert self.n_fits([1.0]) == 11

    def test_an_error_that_falls_for_a_while(self):
        assert self.n_fits([1.0, 0.5, 0.25, 0.25]) == 21

    def test_two_percent_are_not_enough(self):
        assert self.n_fits([1.0, 0.99, 0.985, 0.98]) == 11
        assert self.n_fits([1.0, 0.97, 0.97]) == 16

    def test_it_ends_when_the_error_falls_forever(self):
        assert self.n_fits(list(0.5 ** np.arange(100)), max_fits=42) == 42

    def test_an_error_that_is_not_finite(self):
        assert self.n_fits([float("nan")]) == 11


class TestPreparation:
    def make(self, n_steps=130, **kwargs):
        model = Counts(**kwargs)
        model.shifts = kwargs.get("shifts", False)
        return model, ModelFitting(model, batch_size=8, max_fits=4, n_rollout_steps=50), filled_buffer(n_steps=n_steps)

    def test_scales_then_fits_then_rollouts(self):
        model, fitting, recorded = self.make()
        assert not fitting.is_prepared
        fitting.prepare(recorded, 260, horizon=4)
        assert model.calls == ["rescale", "fit", "look", "keep", "fit", "fit", "fit", "restore", "tune"]
        assert fitting.is_prepared and fitting.n_prepared_for == 260
        # As many rows for each member
        assert set(model.n_rows[1:]) == {3 * 8}
        assert model.longest == 4

    def test_at_each_doubling_only_rollouts_are_looked_at(self):
        model, fitting, recorded = self.make()
        fitting.prepare(recorded, 260, 4)
        model.calls.clear()
        fitting.prepare(recorded, 519, 4)
        assert model.calls == []
        fitting.prepare(recorded, 520, 4)
        assert model.calls == ["tune"]
        assert fitting.n_prepared_for == 520

    def test_data_that_have_shifted_need_new_scales(self):
        model, fitting, recorded = self.make(shifts=True)
        fitting.prepare(recorded, 260, 4)
        model.calls.clear()
        fitting.prepare(recorded, 600, 4)
        assert model.calls[0] == "rescale" and model.calls[-1] == "tune" and model.calls.count("fit") == 4

    def test_scales_come_from_the_latest_steps(self):
        model, fitting, recorded = self.make()
        fitting.max_scaling_steps = 40
        fitting.prepare(recorded, 260, 4)
        # 20 rows of 2 environments, without those that are held out
        assert 0 < model.n_rows[0] <= 40

    def test_a_replay_buffer_that_was_not_restored_says_less(self):
        model, fitting, recorded = self.make(n_steps=30)
        fitting.n_prepared_for = 100
        fitting.prepare(recorded, 1000, 4)
        assert model.calls == []
        # ... but one that is full holds all that it can
        full = filled_buffer(n_steps=60, size=40)
        fitting.prepare(full, 1000, 4)
        assert model.calls == ["tune"]


def test_each_update_fits_as_the_schedule_of_the_model_says():
    model = Counts()
    fitting, recorded = ModelFitting(model, batch_size=8, max_fits=3), filled_buffer()
    assert fitting.fit(1, recorded) == 1.0
    assert model.calls == ["fit"]
    model.fitting_schedule = UntilConverged(4, max_fits=3)
    losses = [fitting.fit(number, recorded) for number in range(1, 6)]
    assert losses == [4.0, None, None, None, 7.0]


def test_without_held_out_steps_there_is_no_error():
    model = Counts()
    fitting = ModelFitting(model, batch_size=8)
    recorded = filled_buffer(n_envs=1, n_steps=5)
    assert fitting.held_out_steps(recorded) is None
    assert fitting.validation_error(recorded) is None
    model.fitting_schedule = UntilConverged(1)
    # It stops all the same: at the look that is as far from the start as patience says
    assert fitting.fit(1, recorded) == 201.0


def test_what_was_learned_is_restored():
    model, other = Counts(), Counts()
    fitting, restored = ModelFitting(model, batch_size=8), ModelFitting(other)
    fitting.fit(1, filled_buffer())
    fitting.n_prepared_for = 77
    assert restored.restore(fitting.state())
    assert other.calls == ["fit"] and restored.n_prepared_for == 77
    assert ModelFitting(Counts()).restore(None)


def test_what_was_learned_of_another_model_is_forgotten():
    fitting = ModelFitting(Counts())
    with pytest.warns(UserWarning, match="learned of another model is forgotten"):
        assert not fitting.restore({"model": SavedObject.of({"weights": 1}), "n_prepared_for": 77})
    assert not fitting.is_prepared
    # A model that was never fitted has nothing to forget
    assert not fitting.restore({"model": SavedObject.of({"weights": 1}), "n_prepared_for": 0})


def test_an_ensemble_is_fitted_as_its_schedule_says_while_a_policy_is_trained():
    fitted_at = []

    class Dynamics(LearnedDynamics):
        fitting_schedule = UntilConverged(20)

        def fit(self, transitions):
            fitted_at.append(model._n_updates)
            return super().fit(transitions)

    dynamics = Dynamics(n_states=2, n_actions=1)
    model = MPG("MlpPolicy", LinearEnv(), prior_model=dynamics, horizons=(0, 2), **SMALL)
    model.learn(85)
    assert model._n_updates == 45
    # At the start, and again as the schedule says
    assert set(fitted_at) == {0, 21, 41}
    assert model.rollout_model is dynamics
    assert th.isfinite(dynamics.step(th.zeros(3, 2), th.zeros(3, 1))[0]).all()
