"""What is known of the forward pass that runs now; it is made when the pass begins and dropped when it ends."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import nn

from trady.analysis.fusion import FusionPlan
from trady.analysis.segments import Segment
from trady.interception.deferred_segment import DeferredSegment
from trady.interception.places import Place
from trady.model.mode import Section, current_section

_top_hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks


@dataclass
class ForwardState:
    """One forward pass, of the model or of a module that is called by itself.

    Attributes:
        module: The module that was called.
        outermost: The frame of the outermost call, as long as it runs: whatever it refers to stays alive with it.
        plan: The expected calls; ``None`` where nothing is known of them, or the pass has left them.
        own: Identities of the model's parameters: those of a module that it reaches in another way are constants.
        span: First call of the plan, and one past the last, of the module that was called.
        segments: By its first call, what is recomputed in the backward pass.
        section: The checkpoint that the pass began in.
        depth: Calls of modules under way; where only the end of the outermost is heard of, of that one.
        modules: Names of the modules whose calls are under way.
        cursor: The call of the plan that is expected next.
        at_risk: Whether something was put off or overwritten, so that the pass must follow the plan.
        writing: The segment that is being written down.
        wrote: Whether one has been.
        places: What was decided of the places of the plan in earlier passes; ``None`` where every call is asked.
        lost: Whether the pass has gone another way where the model decides, and has not come back to the plan yet.
    """

    module: nn.Module
    outermost: FrameType | None
    plan: FusionPlan | None = None
    own: Set[int] = frozenset()
    span: tuple[int, int] = (0, sys.maxsize)
    segments: Mapping[int, Segment] = field(default_factory=dict)
    section: Section = field(default_factory=current_section)
    depth: int = 1
    modules: list[str] = field(default_factory=list)
    cursor: int = field(init=False)
    at_risk: bool = False
    writing: DeferredSegment | None = None
    wrote: bool = False
    lost: bool = False
    places: list[Place | None] | None = None

    def __post_init__(self) -> None:
        self.cursor = self.span[0]

    def decided(self) -> None:
        """Note that the model may decide now, if the plan says so: what is behind is done, so it may leave the plan."""
        if self.plan is not None and self.writing is None and self.cursor in self.plan.decisions:
            self.at_risk = False

    def commit(self) -> None:
        """Note that a value was put off or overwritten: from here on, the pass must follow the plan."""
        self.at_risk = True

    def as_before(self, place: Place, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a call as its place says and go on; ``NotImplemented`` where it cannot say that."""
        if place.compute is None:
            return NotImplemented
        self.cursor += 1
        out = place.compute(args, kwargs)
        if out is NotImplemented:
            self.cursor -= 1
        elif place.commits:
            self.at_risk = True
        return out

    @property
    def is_in_section(self) -> bool:
        """Whether calls run in the checkpoint that the pass began in, with gradients as then."""
        hooks, (before, gradients) = _top_hooks(False), self.section
        return (0 if hooks is None else id(hooks[0])) == before and (torch.is_grad_enabled() or not gradients)

    @property
    def abandoned(self) -> bool:
        """Whether the outermost call has ended without a word: only a frame that runs refuses to be cleared."""
        try:
            if self.outermost is not None:
                self.outermost.clear()
        except RuntimeError:
            return False
        return True
