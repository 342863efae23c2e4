"""Constructor arguments that are stored in a part of the algorithm."""

from typing import Any


class SettingOf:
    """
    Descriptor for a constructor argument that is stored in a part of the algorithm: ``model.n_learners`` reads and sets
    ``model.learner_settings.n_learners``.

    :param part: name of the attribute that holds the part
    """

    def __init__(self, part: str):
        self.part = part
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, algorithm: Any, owner: type | None = None) -> Any:
        return self if algorithm is None else getattr(getattr(algorithm, self.part), self.name)

    def __set__(self, algorithm: Any, value: Any) -> None:
        setattr(getattr(algorithm, self.part), self.name, value)
