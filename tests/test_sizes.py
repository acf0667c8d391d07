"""Sizes in text, both ways."""

import pytest

from awq_core.errors import ConfigError
from awq_core.sizes import parse_size, size_text


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5_000_000_000),
        ("4.7 GiB", int(4.7 * 2**30)),
        ("800m", 800_000_000),
        ("12kb", 12_000),
        ("1TiB", 2**40),
        ("123", 123),
        ("123 B", 123),
        (123456, 123456),
        (2.5e9, 2_500_000_000),
    ],
)
def test_parse(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 GBs", "-5GB", "0", "1.2.3GB", "five", "nan", "inf", float("inf")])
def test_refused(text, one_line):
    with pytest.raises(ConfigError) as error:
        parse_size(text)
    one_line(error.value, "is no size")


def test_text_and_back():
    for size in (1, 999, 1500, 13_500_000_000, 7_000_000_000_000):
        assert parse_size(size_text(size)) == size
