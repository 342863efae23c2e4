"""The tasks by name. Packages that a task needs are imported when its environment is made."""

from outside.tasks import (
    cartpole_swingup,
    cartpole_swingup_repeat,
    cstr,
    dc_motor,
    four_tank,
    inverted_double_pendulum,
    inverted_pendulum,
    mountain_car,
    parking,
    pendulum,
    pendulum_fast,
    reacher,
)
from prior_models import KnowsNothing

TASKS = {
    module.__name__.rpartition(".")[2]: module.TASK._replace(models={**module.TASK.models, "nothing": KnowsNothing})
    for module in (
        inverted_pendulum,
        inverted_double_pendulum,
        reacher,
        mountain_car,
        pendulum,
        pendulum_fast,
        cartpole_swingup,
        cartpole_swingup_repeat,
        cstr,
        four_tank,
        dc_motor,
        parking,
    )
}
