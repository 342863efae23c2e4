"""Files that are whole whenever they can be seen."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stable_baselines3.common.save_util import open_path


def write_whole(path: Path, content: bytes) -> None:
    """
    Write a file. Whatever fails, a file that exists there stays as it is until the new one is complete.

    :param path: where to write it; a file that exists there is replaced
    :param content: what to write
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def saved_whole(path: Any) -> Iterator[Any]:
    """
    Context in which SB3 saves an algorithm. SB3 empties an existing file before it knows that it can write the new one.

    :param path: where to save it, as SB3's ``save`` takes it
    :return: what to pass to SB3's ``save`` in its place
    """
    if not isinstance(path, (str, Path)):
        yield path
        return
    content = io.BytesIO()
    yield content
    target = Path(path) if Path(path).suffix else Path(f"{path}.zip")
    if target.is_dir() or not target.parent.is_dir():
        # SB3 takes another name, or creates the folder: there is no earlier file
        with open_path(path, "w", suffix="zip") as file:
            file.write(content.getvalue())
    else:
        write_whole(target, content.getvalue())
