"""Where the loop of a transformers-like trainer stands, told to its budget."""

from __future__ import annotations

from typing import Any


def loop_callback(session: Any) -> Any:
    """Tell the session where its trainer's loop stands."""
    from transformers import TrainerCallback

    class Steps(TrainerCallback):  # type: ignore[misc]
        """Tells a trainer's budget where the loop stands."""

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            session.epoch_begins(int((state.epoch or 0.0) + 1e-6))  # a whole number, but for rounding

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            session.drop_gradients()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            session.end_step(state.global_step, state.max_steps, state.num_train_epochs)

    return Steps()
