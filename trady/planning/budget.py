"""What may be spent: a budget, read from text and written back. :mod:`trady.planning.scopes` has its kinds."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral
from typing import Any

from trady.errors import BudgetError
from trady.planning.scopes import PEAK, SCOPES, BudgetScope
from trady.report.units import BINARY_UNITS, format_bytes

_DECIMAL = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "kB": 10**3}

_UNITS = {**BINARY_UNITS, **_DECIMAL, "B": 1}

_UNIT_BYTES = {unit.lower(): size for unit, size in _UNITS.items()}

_AMOUNT = re.compile(
    r"(?P<sign>[+-]?)(?P<number>[0-9][0-9_,]*(?:\.[0-9]+)?|\.[0-9]+)(?P<exponent>[eE][+-]?[0-9]{1,2})?"
    r"\s*(?P<unit>[A-Za-z]*)"
)

_NOT_FINITE = re.compile(r"[+-]?(?:inf|infinity|nan)\b", re.IGNORECASE)

_BITS = re.compile(r"[KMGT]i?b")

_UNDERSCORED = re.compile(r"[0-9]+(?:_[0-9]+)*(?:\.[0-9]+)?|\.[0-9]+")

_THOUSANDS = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")

_LONGEST = 64

_LARGEST = 2**63 - 1


@dataclass(frozen=True)
class Budget:
    """How much may be spent, and on what. ``str(budget)`` is a text that parses back to it.

    Attributes:
        scope: What is bounded; its name is accepted too.
        amount: Bytes (``peak``, ``process``, ``update``) or elements for one sample (``elements``).

    Raises:
        BudgetError: For an unknown scope, and an amount that is no whole number from 1 to 2**63 - 1.
    """

    scope: BudgetScope
    amount: int

    def __post_init__(self) -> None:
        if (known := _read_scope(str(self.scope), self.scope)) != self.scope:
            object.__setattr__(self, "scope", known)
        if not _is_whole(self.amount):
            raise _refusal(self.amount, "is not a whole number of bytes or elements", self.scope)
        object.__setattr__(self, "amount", int(self.amount))
        if self.amount <= 0:
            raise _refusal(self.amount, "is not more than zero", self.scope)
        if self.amount > _LARGEST:
            raise _refusal(self.amount, "is more than any machine holds", self.scope)

    @property
    def peak_bytes(self) -> int | None:
        """The bytes that a whole training step may take; ``None`` where something else is bounded."""
        return self.scope.peak_of(self.amount)

    def as_planned(self, plan: Mapping[str, Any]) -> Budget:
        """The budget with what a plan (:meth:`trady.Plan.to_json`) knows of it."""
        return Budget(self.scope.as_planned(plan), self.amount)

    def __str__(self) -> str:
        return f"{self.scope}:{_exact_bytes(self.amount) if self.scope.in_bytes else self.amount}"


def parse_budget(text: str | int | Budget) -> Budget:
    """Read a budget.

    Args:
        text: ``"300 MiB"`` or ``"peak:300 MiB"``, ``"process:400 MiB"``, ``"update:1 MiB"``, ``"elements:27946"``.
            KiB, MiB, GiB and TiB are binary, kB, MB, GB and TB decimal; a fraction of a byte is
            dropped. An ``int`` is bytes of ``peak``. A :class:`Budget` is returned as it is.

    Raises:
        BudgetError: When the text cannot be read, or names no amount above zero; the message
            says what was given, what is possible, and an example to type.
    """
    if isinstance(text, Budget):
        return text
    if not isinstance(text, str):
        if not _is_whole(text):
            raise _refusal(text, "is neither a text nor a number of bytes", PEAK)
        return Budget(PEAK, int(text))
    before, colon, after = text.partition(":")
    scope = _read_scope(before, text) if colon else PEAK
    return Budget(scope, _read_amount(after if colon else before, scope, text))


class InfeasibleBudgetError(BudgetError):
    """A budget that nothing fits in.

    Attributes:
        budget: What was asked for.
        least_amount: The minimum, in the unit of ``budget.scope``.
        why: What it is the minimum of, where that is more than a step.
    """

    def __init__(self, budget: Budget, least_amount: int, alternatives: Mapping[str, int], why: str = "") -> None:
        self.budget, self.least_amount, self.why = budget, least_amount, why
        text = f"{budget.scope}:{_rounded_up(least_amount) if budget.scope.in_bytes else least_amount}"
        least = format_bytes(least_amount) if budget.scope.in_bytes else f"{least_amount} elements"
        message = f'budget "{budget}" is below the minimum, which is {least}{why}: type budget="{text}"' + _less_with(
            alternatives
        )
        super().__init__(message)


class StepTooLargeError(BudgetError):
    """A forward pass that was refused before it ran: with it, the step would take more than the budget."""


def infeasible_budget(
    budget: Budget, least_amount: int, alternatives: Mapping[str, int] | None = None, *, why: str = ""
) -> InfeasibleBudgetError:
    """The error for a budget that nothing fits in, with the text that would do.

    Args:
        budget: What was asked for.
        least_amount: The minimum, in the unit of ``budget.scope``.
        alternatives: What would take less, and the minimum bytes with it.
        why: What it is the minimum of, where that is more than a step.
    """
    return InfeasibleBudgetError(budget, least_amount, alternatives or {}, why)


#: A budget that is more than 2^40 times as large as another one is not one that anybody would type instead.
_DOUBLINGS = 40


def smallest(enough: Callable[[int], bool], amount: int) -> int | None:
    """Return the smallest amount that is enough, or one a millionth above it; ``None`` where none is.

    Args:
        enough: Whether an amount is.
        amount: One that is not.
    """
    step = max(1, amount >> 12)  # it is mostly near
    low, high = amount, amount + step
    for _ in range(_DOUBLINGS + 12):
        if enough(high):
            break
        step *= 2
        low, high = high, high + step
    else:
        return None
    while high - low > max(1, amount >> 20):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _less_with(alternatives: Mapping[str, int]) -> str:
    if not alternatives:
        return ""
    return ". Less would do: " + ", ".join(f"{_rounded_up(least)} {what}" for what, least in alternatives.items())


def _refusal(given: object, problem: str, scope: BudgetScope, example: str | None = None) -> BudgetError:
    return BudgetError(
        f'budget {_shown(given)} {problem}; {_possible()}; type e.g. budget="{example or scope.example}"'
    )


def _possible() -> str:
    kinds = []
    for scope in SCOPES.values():
        text = scope.example if ":" in scope.example else f'{scope.example}" or "{scope}:{scope.example}'
        kinds.append(f'"{text}" ({scope.meaning})')
    return f"possible are {', '.join(kinds[:-1])} and {kinds[-1]}, with the units {', '.join(reversed(_UNITS))}"


def _shown(given: object) -> str:
    try:
        text = repr(given)
    except ValueError:  # Python writes no integer of more than 4300 digits.
        return "of thousands of digits"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _is_whole(value: object) -> bool:
    """Whether this is an integer of any library; ``True`` is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _read_scope(text: str, given: object) -> BudgetScope:
    try:
        return SCOPES[text.strip().lower()]
    except KeyError:
        raise _refusal(given, f"names no scope that exists ({', '.join(SCOPES)})", PEAK) from None


def _read_amount(text: str, scope: BudgetScope, given: str) -> int:
    text = text.strip()
    if _NOT_FINITE.match(text):
        raise _refusal(given, "is not a finite amount", scope)
    match = _AMOUNT.fullmatch(text) if len(text) <= _LONGEST else None
    if match is None:
        raise _refusal(given, "cannot be read", scope)
    number = match["number"]
    grouped = not scope.in_bytes and _THOUSANDS.fullmatch(number)
    if "," in number and scope.in_bytes:
        raise _refusal(given, "has a comma; decimals take a point", scope)
    if not grouped and not _UNDERSCORED.fullmatch(number):
        raise _refusal(given, "has a number that cannot be read", scope)
    value = Fraction(number.replace("_", "").replace(",", "") + (match["exponent"] or ""))
    if match["sign"] == "-" or value == 0:
        raise _refusal(given, "is not more than zero", scope)
    size = _read_unit(match["unit"], text, scope, given)
    if not scope.in_bytes and value.denominator != 1:
        raise _refusal(given, "is not a whole number of elements", scope)
    amount = int(value * size)
    if amount == 0:
        raise _refusal(given, "is less than one byte", scope)
    if amount > _LARGEST:
        raise _refusal(given, "is more than any machine holds", scope)
    return amount


def _read_unit(unit: str, amount: str, scope: BudgetScope, given: str) -> int:
    if not scope.in_bytes:
        if unit:
            raise _refusal(given, "has a unit, and elements have none", scope)
        return 1
    if not unit:
        raise _refusal(given, "has no unit", scope, f"{scope}:{amount} MiB")
    if unit.lower() == "elements":
        raise _refusal(given, "counts elements behind the number", SCOPES["elements"])
    if _BITS.fullmatch(unit):
        raise _refusal(given, f"has the unit {unit}, which is bits", scope)
    if unit.lower() not in _UNIT_BYTES:
        raise _refusal(given, f"has an unknown unit {unit}", scope)
    return _UNIT_BYTES[unit.lower()]


def _exact_bytes(amount: int) -> str:
    """The shortest text of a whole number of some unit; a binary one where two are as short."""
    fitting = ((amount // size, unit) for unit, size in _UNITS.items() if amount % size == 0)
    number, unit = min(fitting, key=lambda candidate: len(str(candidate[0])))
    return f"{number} {unit}"


def _rounded_up(amount: int) -> str:
    """Bytes with one decimal, never less than given."""
    unit, size = next(((u, s) for u, s in BINARY_UNITS.items() if amount >= s), ("B", 1))
    tenths = -(-amount * 10 // size)
    return f"{tenths // 10}{f'.{tenths % 10}' if tenths % 10 else ''} {unit}"
