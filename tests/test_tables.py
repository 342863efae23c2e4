"""Tables in plain text."""

from sb3_mpg.common.tables import format_table


def test_columns_are_aligned():
    rows = [["name", "error", "verdict"], ["x", "1.5", "good"], ["velocity", "100", ""]]
    assert format_table(rows) == [
        "name      error  verdict",
        "------------------------",
        "x           1.5  good",
        "velocity    100",
    ]
