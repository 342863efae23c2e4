import multiprocessing as mp

import pytest

from contract.cases import CASES, CASES_AND_LEARNERS, OWN_CASES


@pytest.fixture(autouse=True)
def _models_are_fitted_once(models_are_fitted_once):
    """In all tests of this folder."""


@pytest.fixture(params=CASES, ids=str)
def case(request):
    """Each algorithm, in the main process."""
    return request.param


@pytest.fixture(params=CASES_AND_LEARNERS, ids=str)
def any_case(request):
    """Each algorithm, in the main process and with a learner process, which ends with the training."""
    yield request.param
    assert not [process for process in mp.active_children() if process.name.startswith("learner")]


@pytest.fixture(params=OWN_CASES, ids=str)
def own_case(request):
    """Each algorithm of this library."""
    return request.param
