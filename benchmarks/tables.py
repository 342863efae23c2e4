"""Tables of results, as files and as Markdown."""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """
    :param path: of the file, whose folder is made; it is there as a whole or not at all
    :param rows: by column; columns may be missing in some of them
    """
    assert rows, path
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    with unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns_of(rows), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(unfinished, path)


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """
    :param rows: by column
    :return: all columns, in the order in which they come up
    """
    return list(dict.fromkeys(column for row in rows for column in row))


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """
    :param rows: by column, printed as a table in Markdown
    """
    columns = columns_of(rows)
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(str(row.get(column, "")) for column in columns) + " |")
