"""Numbers for people: bytes, shares, counts, bars."""

from __future__ import annotations

BINARY_UNITS = {"TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10}


def format_bytes(n: float) -> str:
    """Bytes for people, in the binary unit that leaves one to four digits, e.g. ``117.5 MiB``."""
    if n < 0:
        return f"-{format_bytes(-n)}"
    if n < 1023.5:
        return f"{n:.0f} B"
    ascending = reversed(BINARY_UNITS.items())
    unit, size = next(((u, s) for u, s in ascending if n < 1023.95 * s), ("TiB", 2**40))
    return f"{n / size:.1f} {unit}"


BAR_WIDTH = 30


def range_bar(low: int, high: int, top: int, budget_bytes: int | None) -> str:
    """Draw a bar up to ``low``, a lighter one up to ``high`` and a mark at the budget; the scale ends at ``top``."""
    cells = ["█"] * round(BAR_WIDTH * low / top) + ["░"] * (
        round(BAR_WIDTH * high / top) - round(BAR_WIDTH * low / top)
    )
    cells += [" "] * (BAR_WIDTH + 1 - len(cells))
    if budget_bytes is not None and budget_bytes <= top:
        cells[round(BAR_WIDTH * budget_bytes / top)] = "◆"
    return "".join(cells).rstrip()


def format_count(number: int) -> str:
    """Format a count with thin groups of thousands, e.g. ``27 946``."""
    return f"{number:,}".replace(",", " ")


def format_percent(share: float) -> str:
    """Format a share with two digits where it is small, e.g. ``0.12 %``."""
    return f"{100 * share:.0f} %" if share >= 0.1 or not share else f"{100 * share:.2g} %"


def format_fine_percent(share: float) -> str:
    """Format a share with two decimals, e.g. ``99.37 %``."""
    return f"{100 * share:.2f} %"
