"""The trainers of transformers, TRL and sentence-transformers in small: models, texts and tokenizers made here."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

#: Trainers of TRL look for the hub when they are made.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

#: Words of the vocabulary beside the special ones.
WORDS = 60
SAMPLES = 16
#: Settings of all runs: plain SGD with momentum, so that a gradient of next to nothing makes no step.
SETTINGS: Mapping[str, Any] = {
    "per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 0.05, "optim": "sgd",
    "optim_args": "momentum=0.9", "weight_decay": 0.0, "report_to": [], "disable_tqdm": True, "save_strategy": "no",
    "use_cpu": True, "seed": 5, "bf16": False, "logging_steps": 1,
}  # fmt: skip

Build = Callable[[Path, dict[str, Any]], Any]


def tokenizer() -> Any:
    """A tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{index}" for index in range(WORDS))]
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _seeded(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return make()


def llama(kind: str = "ForCausalLM", **options: Any) -> Any:
    """A Llama of two layers."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=WORDS + 4, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2, **options,
    )  # fmt: skip
    return _seeded(lambda: getattr(transformers, f"Llama{kind}")(config))


def bert(kind: str = "ForSequenceClassification") -> Any:
    """A BERT of two layers, without dropout."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=WORDS + 4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2,
    )  # fmt: skip
    return _seeded(lambda: getattr(transformers, f"Bert{kind}")(config))


def texts(least: int, most: int, seed: int = 0, count: int = SAMPLES) -> list[str]:
    """Sentences of random words."""
    numbers = random.Random(seed)
    words = (numbers.randint(least, most) for _ in range(count))
    return [" ".join(f"w{numbers.randrange(WORDS)}" for _ in range(length)) for length in words]


def tokens(least: int, most: int, seed: int = 0) -> list[list[int]]:
    """The same as ids."""
    return [[4 + int(word[1:]) for word in text.split()] for text in texts(least, most, seed)]


def _dataset(columns: dict[str, Any]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict(columns)


def _arguments(kind: Any, out: Path, options: Mapping[str, Any]) -> Any:
    return kind(output_dir=str(out), **{**SETTINGS, **options})


def _trained(options: dict[str, Any], data: Any) -> dict[str, Any]:
    """Data to train on, and to evaluate where the options ask for it."""
    evaluates = options.get("eval_strategy", "no") != "no"
    return {"train_dataset": data, "eval_dataset": data if evaluates else None}


def plain(out: Path, options: dict[str, Any], kind: Any = None) -> Any:
    """``transformers.Trainer`` on sentences of two classes."""
    import transformers

    ids = tokens(4, 12)
    data = _dataset({"input_ids": ids, "labels": [index % 2 for index in range(len(ids))]})
    return (kind or transformers.Trainer)(
        model=bert(),
        args=_arguments(transformers.TrainingArguments, out, options),
        data_collator=transformers.DataCollatorWithPadding(tokenizer()),
        **_trained(options, data),
    )


def two_forwards(out: Path, options: dict[str, Any]) -> Any:
    """A loss of two forward passes, one with positional arguments: predictions are to agree without the last word."""
    import transformers

    class Agreeing(transformers.Trainer):  # type: ignore[misc]
        """Two passes before a backward pass."""

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            output = model(**inputs)
            shorter = model(inputs["input_ids"][:, :-1], inputs["attention_mask"][:, :-1])
            loss = output.loss + (output.logits - shorter.logits).square().mean()
            return (loss, output) if return_outputs else loss

    return plain(out, options, Agreeing)


def part_of_the_model(out: Path, options: dict[str, Any]) -> Any:
    """A loss that calls ``model.bert(…)`` and the classifier, and never the model itself."""
    import transformers

    class InParts(transformers.Trainer):  # type: ignore[misc]
        """Calls parts of the model."""

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            labels = inputs.pop("labels")
            hidden = model.bert(**inputs).last_hidden_state[:, 0]
            logits = model.classifier(hidden)
            loss = nn.functional.cross_entropy(logits, labels)
            return (loss, {"logits": logits}) if return_outputs else loss

    return plain(out, options, InParts)


def seq2seq(out: Path, options: dict[str, Any]) -> Any:
    """``Seq2SeqTrainer`` on a T5."""
    import transformers

    config = transformers.T5Config(
        vocab_size=WORDS + 4, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    model = _seeded(lambda: transformers.T5ForConditionalGeneration(config))
    data = _dataset({"input_ids": tokens(4, 12), "labels": tokens(3, 8, seed=1)})
    return transformers.Seq2SeqTrainer(
        model=model,
        args=_arguments(transformers.Seq2SeqTrainingArguments, out, {"generation_max_length": 6, **options}),
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer(), model=model),
        **_trained(options, data),
    )


def sft(out: Path, options: dict[str, Any]) -> Any:
    """TRL's ``SFTTrainer``."""
    import trl

    args = _arguments(trl.SFTConfig, out, {"max_length": 32, "gradient_checkpointing": False, **options})
    return trl.SFTTrainer(
        model=llama(), args=args, processing_class=tokenizer(), **_trained(options, _dataset({"text": texts(5, 15)}))
    )


def dpo(out: Path, options: dict[str, Any]) -> Any:
    """TRL's ``DPOTrainer``."""
    import trl

    prompts = [f"{text} " for text in texts(3, 6)]
    data = _dataset({"prompt": prompts, "chosen": texts(3, 9, seed=1), "rejected": texts(3, 9, seed=2)})
    return trl.DPOTrainer(
        model=llama(),
        ref_model=llama(),
        args=_arguments(trl.DPOConfig, out, {"gradient_checkpointing": False, **options}),
        processing_class=tokenizer(),
        **_trained(options, data),
    )


def reward(out: Path, options: dict[str, Any]) -> Any:
    """TRL's ``RewardTrainer``."""
    import trl

    data = _dataset({"chosen": texts(3, 9, seed=1), "rejected": texts(3, 9, seed=2)})
    return trl.RewardTrainer(
        model=llama("ForSequenceClassification", num_labels=1),
        args=_arguments(trl.RewardConfig, out, {"gradient_checkpointing": False, **options}),
        processing_class=tokenizer(),
        **_trained(options, data),
    )


def _different_words(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


def grpo(out: Path, options: dict[str, Any]) -> Any:
    """TRL's ``GRPOTrainer``; what it learns from is generated by the armed model."""
    import trl

    settings = {"num_generations": 2, "max_completion_length": 8, "gradient_checkpointing": False, **options}
    if settings.get("eval_strategy", "no") != "no":
        settings.setdefault("per_device_eval_batch_size", 4)
    return trl.GRPOTrainer(
        model=llama(),
        args=_arguments(trl.GRPOConfig, out, {"learning_rate": 0.2, **settings}),
        processing_class=tokenizer(),
        reward_funcs=_different_words,
        **_trained(options, _dataset({"prompt": texts(3, 6)})),
    )


def sentences(out: Path, options: dict[str, Any]) -> Any:
    """``SentenceTransformerTrainer``: a loss of one pass for each column."""
    import sentence_transformers as st
    from sentence_transformers import losses, models

    folder = out / "bert"
    bert("Model").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    encoder = models.Transformer(str(folder))
    model = st.SentenceTransformer(modules=[encoder, models.Pooling(32)], device="cpu")
    data = _dataset({"anchor": texts(3, 9, seed=1), "positive": texts(3, 9, seed=2)})
    return st.SentenceTransformerTrainer(
        model=model,
        args=_arguments(st.SentenceTransformerTrainingArguments, out, options),
        loss=losses.MultipleNegativesRankingLoss(model),
        **_trained(options, data),
    )


#: Trainers by the name that people know them by.
BUILDS: Mapping[str, Build] = {
    "Trainer": plain,
    "Trainer, two forwards": two_forwards,
    "Trainer, model.bert(…)": part_of_the_model,
    "Seq2SeqTrainer": seq2seq,
    "SFTTrainer": sft,
    "DPOTrainer": dpo,
    "RewardTrainer": reward,
    "GRPOTrainer": grpo,
    "SentenceTransformerTrainer": sentences,
}
