"""The largest number whose peak stays within a limit, found in few simulations."""

from __future__ import annotations

from collections.abc import Callable


def largest_within(peak_of: Callable[[int], int], limit: int, start: int, most: int, known: int | None = None) -> int:
    """Return the largest number from 1 to ``most`` whose peak is within the limit; 0 if none is.

    Peaks rise with the number, nearly along a line: the next number that is tried is where the line through the last
    two meets the limit. Whenever that has not halved what is left twice in a row, the middle is tried.

    Args:
        peak_of: The peak of a number, in bytes.
        limit: What it may be.
        start: The first number that is tried.
        most: No number beyond this is tried.
        known: The peak of ``start``, if it is known.

    """
    low, high = 0, most + 1  # low fits, high does not
    points: list[tuple[int, int]] = []
    guess, slow = min(start, most), 0
    while high - low > 1:
        peak = known if known is not None and guess == start and not points else peak_of(guess)
        points.append((guess, peak))
        before = high - low
        low, high = (guess, high) if peak <= limit else (low, guess)
        slow = slow + 1 if 2 * (high - low) > before else 0
        guess = _next(points, limit, low, high, beyond=high == most + 1)
        if slow > 1 and high <= most:
            guess, slow = (low + high) // 2, 0
        guess = max(low + 1, min(guess, high - 1))
    return low


def _next(points: list[tuple[int, int]], limit: int, low: int, high: int, *, beyond: bool) -> int:
    """Guess where the limit is met."""
    (x, y), *earlier = reversed(points)
    if not earlier:
        return 2 * x if y <= limit else x // 2
    x_before, y_before = earlier[0]
    if y == y_before:
        return 2 * low if beyond else (low + high) // 2
    met = int(x + (limit - y) * (x - x_before) / (y - y_before))
    if met <= low:  # the line says just what is known: look right above
        return low + 1
    if beyond:
        return min(met, 8 * max(low, 1))
    return met
