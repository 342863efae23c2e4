"""The names of models in messages."""

from models import Known

from sb3_mpg.common.models.double_precision import InDoublePrecision
from sb3_mpg.common.models.loading import name_of
from sb3_mpg.common.models.residual import ResidualModel


def test_models_are_called_by_the_name_of_the_users_class():
    for model in (Known(), ResidualModel(Known(), 2, 2), InDoublePrecision(Known())):
        assert name_of(model) == "Known"
