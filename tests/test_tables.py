"""Tables in plain text, and numbers in them."""

import math

import pytest

from sb3_mpg.common.tables import format_number, format_share, format_table


def test_columns_are_aligned():
    rows = [["name", "error", "verdict"], ["x", "1.5", "good"], ["velocity", "100", ""]]
    assert format_table(rows) == [
        "name      error  verdict",
        "------------------------",
        "x           1.5  good",
        "velocity    100",
    ]


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0.0%"),
        (0.1234, "12.3%"),
        (9.5, "950.0%"),
        (10.5, "> 1000%"),
        (3.9e19, "> 1000%"),
        (math.inf, "not finite"),
        (math.nan, "not finite"),
    ],
)
def test_shares(share, text):
    assert format_share(share) == text
    assert format_share(share, digits=0) == text.replace(".0%", "%").replace("12.3", "12")


def test_numbers():
    assert format_number(1234.5) == "1.23e+03" and format_number(0.5, "+.2g") == "+0.5"
    assert format_number(-math.inf) == format_number(math.nan, "+.2g") == "not finite"
