"""Steps on what a model has generated (GRPO, RLOO, distillation of TRL): how large they can become.

The first completions are as short as they happen to be. But prompts are as long as those of the data, and completions
end at ``max_completion_length``: the tensors of a step that was generated are stretched to that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

#: Prompts that are turned into tokens at once.
_PROMPTS = 1000


def generates(trainer: Any) -> bool:
    """Whether a trainer generates what it trains on."""
    return hasattr(trainer, "_generate_and_score_completions")


def longest_generated(trainer: Any, prepared: Any, data: Any) -> list[Any]:
    """Return the inputs of a step with the longest prompt of the data and the longest completion that may be.

    Empty where a step has other inputs than prompts and completions.

    Args:
        trainer: One that generates.
        prepared: Inputs of a step, as it has generated them.
        data: Its prompts, to be read by index; ``None`` for those that can be read once only.
    """
    if not isinstance(prepared, Mapping) or not {"prompt_ids", "completion_ids"} <= prepared.keys():
        return []
    before = tuple(prepared[name].shape[1] for name in ("prompt_ids", "completion_ids"))
    prompt = max(before[0], _longest_prompt(trainer, data))
    completion = max(before[1], getattr(trainer, "max_completion_length", None) or 0)
    if (multiple := getattr(trainer, "pad_to_multiple_of", None)) is not None:
        prompt, completion = (-(-length // multiple) * multiple for length in (prompt, completion))
    positions = getattr(getattr(trainer.model, "config", None), "max_position_embeddings", None)
    if isinstance(positions, int):  # the model is made for no more
        completion = max(before[1], min(completion, positions - prompt))
    samples = len(prepared["prompt_ids"])
    inputs = {name: _stretched(name, value, samples, before, (prompt, completion)) for name, value in prepared.items()}
    if isinstance(mask := inputs.get("prompt_mask"), Tensor):
        mask[0, 0] = 0  # prompts differ in length, and a model may make more of a mask than of none
    return [inputs]


def _stretched(name: str, value: Any, samples: int, before: tuple[int, int], now: tuple[int, int]) -> Any:
    """Repeat the columns of what has one for each token of the prompt, of the completion, or of both."""
    if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[0] != samples:
        return value
    ours = {before[1]: now[1], sum(before): sum(now)}
    widths = {before[0]: now[0]} if name.startswith("prompt") else ours
    wanted = widths.get(value.shape[1])
    if wanted is None:
        return value
    return value[:, torch.arange(wanted, device=value.device) % value.shape[1]]


def _longest_prompt(trainer: Any, data: Any) -> int:
    """Return the tokens of the longest prompt; 0 where they are not text alone, or tools are chosen for each batch."""
    names = getattr(data, "column_names", None) or ()
    if "prompt" not in names or {"image", "images"} & set(names) or getattr(trainer, "environment_factories", None):
        return 0
    longest = 0
    for rows in data.select_columns(["prompt"]).iter(_PROMPTS):
        ids = trainer._tokenize_prompts(rows["prompt"])[0]
        longest = max(longest, *map(len, ids))
    return longest
