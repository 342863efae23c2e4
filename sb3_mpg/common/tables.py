"""Tables in plain text, and the numbers in them."""

import math

# Larger shares say no more than that a prediction is useless
MAX_SHARE = 10.0


def format_share(share: float, digits: int = 1) -> str:
    """
    :param share: a quotient, such as an error divided by the actual change
    :param digits: decimal places of the percentage
    :return: the share in percent, up to ``MAX_SHARE``
    """
    if not math.isfinite(share):
        return "not finite"
    return f"> {MAX_SHARE:.0%}" if share > MAX_SHARE else f"{share:.{digits}%}"


def format_number(value: float, spec: str = ".3g") -> str:
    """
    :param value: any number
    :param spec: how to format it
    :return: the number as text
    """
    return format(value, spec) if math.isfinite(value) else "not finite"


def format_table(rows: list[list[str]]) -> list[str]:
    """
    :param rows: cells, the header first; the first and the last column are text, the others are numbers
    :return: aligned lines, with a ruler below the header
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *numbers, last = [
            cell.ljust(width) if column in (0, len(widths) - 1) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join([first, *numbers, last]).rstrip())
    lines.insert(1, "-" * max(len(line) for line in lines))
    return lines
