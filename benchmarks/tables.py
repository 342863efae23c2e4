"""Results as csv files and as tables in Markdown."""

import csv
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from machine import ORIGIN, origin

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parent / "figures"


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """
    Write a csv file. Rows without the columns ``ORIGIN`` get those of this process.

    :param path: path of the file; its folder is created. An interrupted call leaves no incomplete file.
    :param rows: values by column; each row may lack columns
    """
    if not rows:
        raise ValueError(f"There are no rows for {path}")
    written_here = origin()
    rows = [{**row, **{name: row.get(name, written_here[name]) for name in ORIGIN}} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    with unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns_of(rows), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(unfinished, path)


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """
    :param rows: values by column
    :return: all columns, in the order of their first appearance
    """
    return list(dict.fromkeys(column for row in rows for column in row))


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """
    Print a table in Markdown, without the columns ``ORIGIN``.

    :param rows: values by column
    """
    columns = [column for column in columns_of(rows) if column not in ORIGIN]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(str(row.get(column, "")) for column in columns) + " |")


class Run(NamedTuple):
    """
    A learning curve.

    :param curve: steps, updates or seconds, and mean returns, ``(n, 2)``
    :param origin: the columns ``ORIGIN``
    """

    curve: np.ndarray
    origin: dict[str, str]

    def first_above(self, goal: float) -> float | None:
        """
        :param goal: a return
        :return: steps, updates or seconds of the first evaluation above the goal, or ``None`` if there is none
        """
        above = self.curve[self.curve[:, 1] > goal]
        return float(above[0, 0]) if len(above) else None


#: Runs by the parts of their file name (without the seed) and by seed
Runs = dict[tuple[str, ...], dict[int, Run]]


def read_runs(folder: Path, x_column: str, n_parts: int) -> Runs:
    """
    Read the csv files of a benchmark with one file per run, ``PART-PART-...-SEED.csv``.

    :param folder: folder of the files
    :param x_column: ``steps``, ``updates`` or ``seconds``
    :param n_parts: number of parts of a file name before the seed; other files are skipped
    :return: the runs
    """
    runs: Runs = defaultdict(dict)
    for path in sorted(folder.glob("*.csv")):
        *parts, seed = path.stem.split("-")
        if len(parts) != n_parts:
            continue
        with path.open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        curve = np.array([(float(row[x_column]), float(row["return_mean"])) for row in rows])
        runs[tuple(parts)][int(seed)] = Run(curve, {name: rows[0][name] for name in ORIGIN})
    return dict(runs)
