"""A language model of a run: what it says after a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trady.errors import DataError
from trady.prediction.predictor import Prediction
from trady.prediction.texts import OfTexts
from trady.training.precision import autocast
from trady.training.texts.dataset import IDS
from trady.training.texts.labels import is_missing

#: Tokens that are generated where nobody says how many.
NEW_TOKENS = 64


@dataclass(frozen=True)
class Generation:
    """How a text is continued.

    Attributes:
        new_tokens: Up to so many; the end of a text, where the tokenizer has a word for it, comes before.
        temperature: 0 takes the likeliest token each time, more draws others too.
        seed: Of what is drawn.
    """

    new_tokens: int = NEW_TOKENS
    temperature: float = 0.0
    seed: int = 0


class TextGenerator(OfTexts):
    """A run on texts without labels, or on conversations.

    A prompt is a string. Of a run on conversations it is what the user says, put into the tokenizer's chat template.
    """

    generation = Generation()

    def preprocess(self, source: Any) -> Tensor:
        """Return the tokens of a prompt, ``[tokens]``.

        Raises:
            DataError: It is no text, or has none.
        """
        if not isinstance(source, str) or is_missing(source):
            raise DataError("the prompt is empty" if isinstance(source, str) else f"{source!r:.60} is not a prompt")
        if self.texts.chat:
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": source}], tokenize=False, add_generation_prompt=True
            )
            ids = self.tokenizer(text, add_special_tokens=False)[IDS]
        else:
            bare = self.tokenizer("")[IDS]
            begins = bare[:1] if bare and bare[0] == self.tokenizer.bos_token_id else []
            ids = begins + self.tokenizer(source, add_special_tokens=False)[IDS]
        if not ids:
            raise DataError("the prompt has no token that the model knows")
        return torch.tensor(ids, dtype=torch.int64)

    def predictions(
        self,
        inputs: Any,
        *,
        batch_size: int | None = None,
        top: int = 1,
        names: Sequence[str] | None = None,
    ) -> Iterator[Prediction]:
        """Yield what the model says after each prompt, as ``label``; prompts are taken one at a time."""
        for source in self._many(inputs):
            column = {"prompt" if self.texts.chat else self.texts.text_columns[0]: str(source)}
            try:
                said = self.generate(source)
            except DataError as error:
                yield Prediction(str(source), None, None, error=str(error), inputs=column)
                continue
            yield Prediction(str(source), said, None, inputs=column)

    def generate(self, prompt: str, generation: Generation | None = None) -> str:
        """Return what the model says after a prompt.

        Raises:
            DataError: The prompt is empty, or leaves no room.
        """
        how = generation or self.generation
        ids = self.preprocess(prompt)
        model: Any = self.model
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        room = how.new_tokens if not isinstance(limit, int) else min(how.new_tokens, limit - len(ids))
        if room < 1:
            raise DataError(f"the prompt has {len(ids)} tokens, and the model takes {limit} with what it says")
        options: dict[str, Any] = {"max_new_tokens": room, "do_sample": how.temperature > 0, "use_cache": True}
        if how.temperature > 0:
            options["temperature"] = how.temperature
        with torch.random.fork_rng(), torch.no_grad(), autocast(self.device, self.description.precision):
            torch.manual_seed(how.seed)
            found = model.generate(
                input_ids=ids[None].to(self.device),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64, device=self.device),
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
                **options,
            )
        said = self._text(found[0, len(ids) :])
        if self.texts.chat:
            return said.strip()
        # Of the whole: a tokenizer may drop the space that a text would begin with.
        before, whole = self._text(ids), self._text(found[0])
        return whole[len(before) :] if whole.startswith(before) else said

    def _text(self, ids: Tensor) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _many(self, inputs: Any) -> list[Any]:
        return [inputs] if isinstance(inputs, str) else list(inputs)
