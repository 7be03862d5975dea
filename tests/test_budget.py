from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trady.errors import BudgetError, TradyError
from trady.planning.budget import Budget, infeasible_budget, parse_budget
from trady.planning.scopes import ELEMENTS, PEAK, SCOPES, UPDATE, BudgetScope
from trady.report.units import format_bytes

UNIT_BYTES = {
    "B": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
amounts = st.integers(1, 2**63 - 1)
byte_scopes = st.sampled_from([PEAK, UPDATE])


@pytest.mark.parametrize(
    ("text", "scope", "amount"),
    [
        ("300 MiB", PEAK, 300 * 2**20),
        ("peak:300 MiB", PEAK, 300 * 2**20),
        ("PEAK : 300MIB", PEAK, 300 * 2**20),
        ("300 mib", PEAK, 300 * 2**20),
        ("  1.5 GiB ", PEAK, 3 * 2**29),
        (".5 GiB", PEAK, 2**29),
        ("1_000 MB", PEAK, 10**9),
        ("+3 mb", PEAK, 3 * 10**6),
        ("1e3 B", PEAK, 1000),
        ("update:1 MiB", UPDATE, 2**20),
        ("1.3 KiB", PEAK, 1331),
        ("elements:27946", ELEMENTS, 27946),
        ("elements: 27_946", ELEMENTS, 27946),
        ("elements:27,946", ELEMENTS, 27946),
        ("elements:1.5e6", ELEMENTS, 1_500_000),
        (1024, PEAK, 1024),
        (np.int64(1024), PEAK, 1024),
    ],
)
def test_what_a_user_writes_is_read(text: str, scope: BudgetScope, amount: Any) -> None:
    assert parse_budget(text) == Budget(scope, amount)


def test_a_budget_is_returned_as_it_is() -> None:
    budget = Budget(UPDATE, 5)
    assert parse_budget(budget) is budget


@given(
    unit=st.sampled_from(sorted(UNIT_BYTES)),
    thousandths=st.integers(1000, 10**7),
    space=st.sampled_from(["", " "]),
)
def test_a_decimal_amount_of_any_unit_is_exact_down_to_the_byte(unit: str, thousandths: int, space: str) -> None:
    text = f"{thousandths // 1000}.{thousandths % 1000:03d}{space}{unit}"
    assert parse_budget(text).amount == int(Fraction(thousandths, 1000) * UNIT_BYTES[unit])


@given(scope=st.sampled_from(list(SCOPES.values())), amount=amounts)
def test_the_text_of_a_budget_parses_back_to_it(scope: BudgetScope, amount: Any) -> None:
    budget = Budget(scope, amount)
    assert parse_budget(str(budget)) == budget


@given(
    scope=byte_scopes,
    count=st.integers(1, 999),
    unit=st.sampled_from(["KiB", "MiB", "GiB", "kB", "MB", "GB"]),
)
def test_the_text_of_a_budget_has_no_more_digits_than_what_was_typed(scope: BudgetScope, count: int, unit: str) -> None:
    number, _, _ = str(parse_budget(f"{scope}:{count} {unit}")).partition(":")[2].partition(" ")
    assert len(number) <= len(str(count))


@pytest.mark.parametrize(
    ("text", "problem", "example"),
    [
        ("", "cannot be read", "300 MiB"),
        ("lots", "cannot be read", "300 MiB"),
        ("300", "has no unit", "peak:300 MiB"),
        ("update:7", "has no unit", "update:7 MiB"),
        ("300 M", "unknown unit M", "300 MiB"),
        ("300 MiBs", "unknown unit MiBs", "300 MiB"),
        ("300 Mb", "bits", "300 MiB"),
        ("300 Gib", "bits", "300 MiB"),
        ("1,5 GiB", "comma", "300 MiB"),
        ("1__0 GiB", "cannot be read", "300 MiB"),
        ("0 MiB", "not more than zero", "300 MiB"),
        ("-3 MiB", "not more than zero", "300 MiB"),
        ("0.3 B", "less than one byte", "300 MiB"),
        ("inf GiB", "not a finite", "300 MiB"),
        ("nan", "not a finite", "300 MiB"),
        ("elements:inf", "not a finite", "elements:27946"),
        ("elements:1 MiB", "has a unit", "elements:27946"),
        ("elements:0", "not more than zero", "elements:27946"),
        ("elements:-5", "not more than zero", "elements:27946"),
        ("elements:1.5", "not a whole number", "elements:27946"),
        ("elements:27,94", "cannot be read", "elements:27946"),
        ("27946 elements", "behind the number", "elements:27946"),
        ("memory:300 MiB", "names no scope", "300 MiB"),
        ("9999999999 TiB", "more than any machine", "300 MiB"),
        ("elements:" + "9" * 5000, "cannot be read", "elements:27946"),
        ("٣٠٠ MiB", "cannot be read", "300 MiB"),
        ("1e-3 kB extra", "cannot be read", "300 MiB"),
        (0, "not more than zero", "300 MiB"),
        (-1, "not more than zero", "300 MiB"),
        (True, "neither a text nor", "300 MiB"),
        (1.5, "neither a text nor", "300 MiB"),
        (None, "neither a text nor", "300 MiB"),
    ],
)
def test_a_refusal_says_what_was_given_what_is_possible_and_what_to_type(text: str, problem: str, example: str) -> None:
    with pytest.raises(BudgetError) as caught:
        parse_budget(text)
    message = str(caught.value)
    assert repr(text)[:64] in message
    assert problem in message
    assert "possible are" in message
    assert f'type e.g. budget="{example}"' in message
    assert len(message) < 500


@given(text=st.text())
def test_no_text_raises_anything_but_a_budget_error(text: str) -> None:
    try:
        budget = parse_budget(text)
    except BudgetError:
        return
    assert budget.amount > 0


@pytest.mark.parametrize("amount", [0, -1, 1.0, True, 2**63, "5"])
def test_a_budget_holds_a_positive_whole_number(amount: Any) -> None:
    with pytest.raises(BudgetError):
        Budget(PEAK, amount)


@pytest.mark.parametrize("sign", [1, -1])
def test_an_integer_too_long_to_write_is_refused_like_any_other(sign: str) -> None:
    with pytest.raises(BudgetError, match="budget of thousands of digits"):
        parse_budget(sign * 10**5000)


def test_a_budget_takes_the_name_of_its_scope() -> None:
    name: Any = "update"
    unknown: Any = "memory"
    assert Budget(name, 5).scope == UPDATE
    with pytest.raises(BudgetError, match="names no scope"):
        Budget(unknown, 5)


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1023.7, "1.0 KiB"),
        (1024, "1.0 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (117.5 * 2**20, "117.5 MiB"),
        (1023.9 * 2**20, "1023.9 MiB"),
        (5 * 2**50, "5120.0 TiB"),
        (-1536, "-1.5 KiB"),
    ],
)
def test_bytes_are_shown_in_the_unit_that_reads_best(n: int, text: str) -> None:
    assert format_bytes(n) == text


@given(n=st.integers(1, 2**62))
def test_shown_bytes_parse_back_within_the_rounding(n: int) -> None:
    shown = format_bytes(n)
    unit = UNIT_BYTES[shown.split()[1]]
    assert abs(parse_budget(shown).amount - n) <= unit / 20 + 1 + n / 2**50


@given(scope=st.sampled_from(list(SCOPES.values())), least=st.integers(2, 2**60))
def test_the_text_offered_for_a_budget_below_the_minimum_is_enough(scope: BudgetScope, least: int) -> None:
    error = infeasible_budget(Budget(scope, 1), least)
    assert isinstance(error, TradyError)
    offered = parse_budget(str(error).rpartition('type budget="')[2].rstrip('"'))
    assert offered.scope is scope
    assert least <= offered.amount <= least * 1.1


def test_a_budget_below_the_least_reads_well() -> None:
    assert str(infeasible_budget(parse_budget("10 MiB"), 39_012_352)) == (
        'budget "peak:10 MiB" is below the minimum, which is 37.2 MiB: type budget="peak:37.3 MiB"'
    )
    assert str(infeasible_budget(parse_budget("elements:3"), 400)) == (
        'budget "elements:3" is below the minimum, which is 400 elements: type budget="elements:400"'
    )
