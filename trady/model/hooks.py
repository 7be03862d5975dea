"""Forward hooks that a copy of the model does not take along: the copy is the plain model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Hook:
    """A forward hook that does nothing in a copy of the model.

    Args:
        function: Called as the hook.
        refuse: Called first where ``torch.compile`` traces the model.

    """

    def __init__(self, function: Callable[..., None] | None, refuse: Callable[[], None] | None = None) -> None:
        self._function, self._refuse = function, refuse

    def __call__(self, *arguments: Any) -> None:
        """Run the hook."""
        if self._function is not None:
            if torch.compiler.is_dynamo_compiling() and self._refuse is not None:
                # What is raised in traced code only ends the tracing; out here it reaches the caller.
                torch.compiler.disable(self._refuse)()
            self._function(*arguments)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook(None)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, (None,)
