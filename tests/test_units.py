import pytest

from rayclip.types import UserError
from rayclip.units import format_budget, in_255ths, parse_budget


@pytest.mark.parametrize(
    ("text", "value"),
    [("4/255", 4 / 255), ("0.5/255", 0.5 / 255), ("0", 0.0), (" 1/255 ", 1 / 255), ("0.0157", 0.0157)],
)
def test_a_budget_is_read_in_pixel_units(text, value):
    assert parse_budget(text) == pytest.approx(value, abs=1e-15)


def test_a_bare_number_of_one_or_more_shows_the_fraction():
    with pytest.raises(UserError, match="8/255"):
        parse_budget("8")


@pytest.mark.parametrize("text", ["", "four", "1/0", "nan", "inf", "-1/255", "1/2/3", "255/255", "1e400"])
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(UserError):
        parse_budget(text)


@pytest.mark.parametrize(("value", "text"), [(4 / 255, "4"), (0.5 / 255, "0.5"), (32 / 255, "32"), (0.0, "0")])
def test_budgets_print_in_255ths(value, text):
    assert in_255ths(value) == text
    assert parse_budget(format_budget(value)) == pytest.approx(value)
