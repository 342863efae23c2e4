"""Tables in plain text."""


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
