"""The registry of policies by name; users add their own in the same way."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import TypeVar, overload

from trady.errors import PolicyError
from trady.policies.base import Policy

T = TypeVar("T")

_policies: dict[str, Policy] = {}


@overload
def register_policy(policy: T, *, replace: bool = False) -> T: ...
@overload
def register_policy(policy: None = None, *, replace: bool = False) -> Callable[[T], T]: ...
def register_policy(policy: T | None = None, *, replace: bool = False) -> T | Callable[[T], T]:
    """Make a policy known under its ``name``.

    Takes an instance, or decorates a class that needs no arguments::

        @register_policy
        class First:
            name = "first"
            uses_ranking = False

            def select(self, draw: Draw) -> Selection: ...

    Args:
        policy: The instance or class; leave it out to decorate with options.
        replace: Whether a policy of the same name gives way.

    Returns:
        What was given.

    Raises:
        PolicyError: When it is no policy, or its name is taken and ``replace`` is false.
    """

    def register(given: T) -> T:
        made = _instance(given)
        if made.name in _policies and not replace:
            raise PolicyError(
                f"a policy {made.name!r} exists already; choose another name or type register_policy(..., replace=True)"
            )
        _policies[made.name] = made
        return given

    return register if policy is None else register(policy)


def get_policy(name: str | Policy) -> Policy:
    """The policy of that name; a policy instance is returned as it is.

    Raises:
        PolicyError: When there is none; the message has the nearest name and all of them.
    """
    if not isinstance(name, str):
        if isinstance(name, type):
            raise PolicyError(f"{name.__name__} is a class; give an instance or a registered name")
        return _instance(name)
    if name in _policies:
        return _policies[name]
    near = get_close_matches(name.strip().lower().replace("_", "-").replace(" ", "-"), _policies, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise PolicyError(f"no policy {name!r}; {hint}there are {', '.join(policy_names())}")


def policy_names() -> tuple[str, ...]:
    """The names of all registered policies, in alphabetical order."""
    return tuple(sorted(_policies))


def _instance(given: object) -> Policy:
    try:
        made = given() if isinstance(given, type) else given
    except TypeError as error:
        raise PolicyError(f"{given!r} needs arguments; register an instance of it ({error})") from error
    if not isinstance(made, Policy) or not callable(made.select):
        raise PolicyError(f"{given!r} is no policy: it needs name, uses_ranking and select(draw)")
    if type(made.name) is not str or not made.name:
        raise PolicyError(f"{given!r} is named {made.name!r}; the name is a text such as 'my-policy'")
    return made
