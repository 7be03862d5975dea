"""``transformers.Trainer`` with a budget as an argument: another spelling of :func:`trady.tune`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from trady.analysis.by_hand import Wish
from trady.integrations.trainer import Options, Tuning, tune
from trady.planning.budget import Budget
from trady.planning.plan import Plan
from trady.planning.request import Request
from trady.policies import Policy
from trady.ranking.priors import Known
from trady.ranking.ranking import LayerRanking
from trady.tuner.tuner import Tuner

try:
    import transformers
    from transformers import Trainer
except ImportError as error:
    raise ImportError('this module needs transformers: pip install "trady[transformers]"') from error
if int(transformers.__version__.partition(".")[0]) < 5:
    raise ImportError(f"this module needs transformers 5 or newer, and {transformers.__version__} is installed")

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class TradyMixin(_Base):  # type: ignore[misc, valid-type]
    """For a subclass of ``transformers.Trainer`` of your own: ``class Mine(TradyMixin, SFTTrainer)``.

    What :func:`trady.tune` does for a trainer that is made already.

    Args:
        *args: As the Trainer's.
        budget: What a training step may take, e.g. ``"2 GiB"``; the policy ``head`` needs none.
        policy: Where to update.
        ranking: A layer ranking, ``"online"`` or ``"structural"``; without one the prior of this structure, or online.
        head: Modules that always train, outside the budget.
        train_layers: Layers that channels are drawn from, ``train=`` of :func:`trady.prepare`.
        freeze: Layers that stay as they are (:func:`trady.prepare`); flags ``requires_grad=False`` are obeyed too.
        recompute: What the backward pass recomputes instead of keeping it.
        fidelity: ``exact``, ``8bit`` or ``4bit``: how smooth activations are differentiated.
        over_budget: What happens before a pass that would break the budget: ``"adapt"``, ``"refuse"`` or ``"warn"``.
        draws_per_epoch: An epoch is cut into this many equal parts, and channels are drawn again before each.
        example: As for :func:`trady.tune`.
        **kwargs: As the Trainer's.

    Raises:
        ModelError: FSDP, DeepSpeed, DataParallel, ``torch_compile`` or NEFTune are asked for.
        TrainingError: ``draws_per_epoch`` is less than 1.

    """

    trady: Tuning

    def __init__(
        self,
        *args: Any,
        budget: str | int | Budget | None = None,
        policy: str | Policy = "trady",
        ranking: LayerRanking | Known | None = None,
        head: str | Sequence[str] | None = "auto",
        train_layers: Wish | None = None,
        freeze: Wish | None = None,
        recompute: str = "auto",
        fidelity: str = "exact",
        over_budget: str = "adapt",
        draws_per_epoch: int = 1,
        example: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # What cannot be is refused before the Trainer does its work.
        Options(Request(budget, policy, recompute=recompute, fidelity=fidelity), draws_per_epoch)
        with _unnoticed_quantization(kwargs.get("model", args[0] if args else None)):
            super().__init__(*args, **kwargs)
        tune(
            self, budget=budget, policy=policy, ranking=ranking, head=head, train=train_layers, freeze=freeze,
            recompute=recompute, fidelity=fidelity, draws_per_epoch=draws_per_epoch, example=example,
            over_budget=over_budget,
        )  # fmt: skip

    @property
    def tuner(self) -> Tuner | None:
        """The tuner while it trains."""
        return self.trady.tuner

    @property
    def plan(self) -> Plan | None:
        """What was decided."""
        return self.trady.plan

    def delta(self) -> dict[str, Tensor]:
        """Collect the channels that were ever trained, and the head; :func:`trady.apply_delta` takes it.

        Raises:
            StateError: Nothing was trained yet.
        """
        return self.trady.delta()


class TradyTrainer(TradyMixin, Trainer):  # type: ignore[misc]
    """``transformers.Trainer`` that fine-tunes inside a memory budget; see :class:`TradyMixin`."""


@contextmanager
def _unnoticed_quantization(model: Any) -> Iterator[None]:
    """Hide that a model is quantised: the Trainer wants adapters there, and here its channels train beside it."""
    if not getattr(model, "is_quantized", False):
        yield
        return
    model.is_quantized = False
    try:
        yield
    finally:
        model.is_quantized = True
