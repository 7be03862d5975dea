"""What a kind of call declares: its recognition, its sample axes, what its backward keeps, its handler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic, TypeVar

from torch import Tensor

from trady.calls.handling import Handling
from trady.calls.sample_rules import SampleRule


@dataclass(frozen=True)
class Call:
    """What a call of a torch function means; ``x`` is the activation that it is applied to."""

    x: Tensor


class Keeps(Enum):
    """What the backward pass of a call reads, and the forward pass therefore keeps."""

    NOTHING = "nothing"
    INPUTS = "inputs"
    RESULT = "result"
    BOTH = "both"

    @property
    def inputs(self) -> bool:
        """Whether it reads the inputs."""
        return self in (Keeps.INPUTS, Keeps.BOTH)

    @property
    def result(self) -> bool:
        """Whether it reads the result."""
        return self in (Keeps.RESULT, Keeps.BOTH)


C = TypeVar("C", bound=Call)

#: Reads the arguments of a torch function; ``None`` where they ask for something else, which PyTorch computes.
Reader = Callable[..., C | None]

#: Computes a call; ``None`` where PyTorch's own computation is as good, or the only one that fits.
Handler = Callable[[C, Handling], Tensor | tuple[Tensor, ...] | None]

#: Computes a call from its arguments as it was computed when it was bound; ``NotImplemented`` where they differ in more
#: than their activations, so that it must be recognised again.
Bound = Callable[[tuple[Any, ...], dict[str, Any]], Any]

#: Binds what a call and its handling decide; ``None`` where nothing can be decided beforehand.
Binder = Callable[[C, tuple[Any, ...], Mapping[str, Any], Handling], Bound | None]


def never(call: Call) -> bool:
    """No call."""
    return False


def always(call: Call) -> bool:
    """Every call."""
    return True


@dataclass(frozen=True)
class CallKind(Generic[C]):
    """One kind of call, all of it in one place.

    A new lean operation is a file that makes one of these, and its name in :data:`trady.calls.kinds.KINDS`.

    Attributes:
        call: The type of its calls.
        readers: By torch function, what makes a call of its arguments.
        keeps: What its backward pass keeps, of one call.
        handler: How it is computed while the model is armed; ``None`` leaves it to PyTorch.
        bind: Binds a call that comes again with other activations; ``None`` recognises it every time.
        samples: Whether it treats samples one by one; ``None`` goes by the name of the torch function.
        sums_samples: Whether its result may be a sum or mean over the samples, as that of a loss.
        overwrites_input: Whether it can be computed in the memory of its input where nobody else reads that.
        frees_result: Whether its result is memory of its own that its backward pass does not read, so that the next
            call may overwrite it.
        on_meta: How it is computed on fake tensors where PyTorch refuses to, or keeps something else.
        activations: The fields of a call that hold activations: a trace must not keep them alive.
    """

    call: type[C]
    readers: Mapping[Any, Reader[C]]
    keeps: Callable[[C], Keeps]
    handler: Handler[C] | None = None
    bind: Binder[C] | None = None
    samples: SampleRule | None = None
    sums_samples: bool = False
    overwrites_input: bool = False
    frees_result: Callable[[C], bool] = never
    on_meta: Callable[[C], Tensor] | None = None
    activations: tuple[str, ...] = ("x",)
