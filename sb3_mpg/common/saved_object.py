"""Objects in files that may belong to modules of users."""

from collections.abc import Callable
from typing import Any

import cloudpickle


class SavedObject:
    """
    The pickle of an object in a file. It is opened where the object is used. If the module of the object is missing, it stays
    closed and can be saved again.

    :param content: the pickle
    """

    # Without `__dict__`, which SB3 would write to the file once more, as text
    __slots__ = ("content", "error")

    def __init__(self, content: bytes):
        self.content = content
        #: Why it could not be opened
        self.error = ""

    @classmethod
    def of(cls, value: Any) -> "SavedObject":
        """
        :param value: any object
        :return: its pickle, or the object itself if it is one that could not be opened
        """
        return value if isinstance(value, cls) else cls(cloudpickle.dumps(value))

    def opened(self, check: Callable[[Any], Any] | None = None) -> Any:
        """
        :param check: called with the object; the object counts as closed if this raises an exception
        :return: the object, or this pickle itself if it cannot be opened; ``error`` says why
        """
        try:
            value = cloudpickle.loads(self.content)
            if check is not None:
                check(value)
        except Exception as error:
            # Importing the user's module may raise anything
            self.error = f"{type(error).__name__}: {error}"
            return self
        return value

    def __repr__(self) -> str:
        return f"SavedObject({self.error or 'closed'})"
