"""``transformers.Trainer`` inside a budget: it trains what a loop of one's own trains, and resumes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import trady
from trady.errors import CheckpointError, LockedError, ModelError, StateError, TradyWarning, TrainingError
from trady.records.lock import locked

transformers = pytest.importorskip("transformers")
from trady.integrations.transformers import TradyMixin, TradyTrainer  # noqa: E402

BUDGET = "update:40 KiB"


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sentences whose class is their first token; of growing length where it is asked for."""

    def __init__(self, count: int = 16, length: int = 8, *, grow: bool = False, causal: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = []
        for index in range(count):
            ids = torch.randint(4, 60, (length + (index if grow else 0),), generator=generator)
            ids[0] = 2 + index % 2
            labels = ids.clone() if causal else torch.tensor(index % 2)
            self.rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


def bert(dropout: float = 0.0) -> Any:
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, num_labels=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return transformers.BertForSequenceClassification(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return transformers.GPT2LMHeadModel(config)


def arguments(out: Path, **options: Any) -> Any:
    settings = {
        "output_dir": str(out), "per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 0.01,
        "report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "seed": 5, **options,
    }  # fmt: skip
    return transformers.TrainingArguments(**settings)


def trainer(
    out: Path, model: nn.Module | None = None, data: Any = None, kind: Any = TradyTrainer, **options: Any
) -> Any:
    own = {name: options.pop(name) for name in ("policy", "draws_per_epoch", "data_collator", "example", "head",
                                                "eval_dataset", "optimizer_cls_and_kwargs", "optimizers")
           if name in options}  # fmt: skip
    budget = options.pop("budget", BUDGET)
    return kind(
        model=model or bert(), args=arguments(out, **options), train_dataset=data or Rows(), budget=budget, **own
    )


def padded(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([row["input_ids"] for row in rows], batch_first=True)
    mask = pad([row["attention_mask"] for row in rows], batch_first=True)
    labels = [row["labels"] for row in rows]
    causal = labels[0].dim() == 1
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": pad(labels, batch_first=True, padding_value=-100) if causal else torch.stack(labels),
    }


def test_it_trains_what_a_loop_of_ones_own_trains(tmp_path: Path) -> None:
    """The whole data set in one batch, so that the order of the rows is nothing but the order of a sum.

    Where a gradient is next to nothing, AdamW makes a hundredth of a step of that order; a step is 0.01.
    """
    given = trainer(
        tmp_path, per_device_train_batch_size=16, num_train_epochs=3, max_grad_norm=0.2, weight_decay=5.0,
        lr_scheduler_type="constant", optim="adamw_torch",
    )  # fmt: skip
    given.train()

    model = bert().train()
    batch = padded(Rows().rows)
    tuner = trady.prepare(model, batch, budget=BUDGET, seed=5)
    plain = {"bias", "LayerNorm.weight"}
    decays = {name: not any(name.endswith(end) for end in plain) for name, _ in tuner.named_parameters()}
    groups = [
        {"params": [p for n, p in tuner.named_parameters() if decays[n] is wanted], "weight_decay": 5.0 * wanted}
        for wanted in (True, False)
    ]
    optimizer = tuner.attach(torch.optim.AdamW(groups, lr=0.01))
    for epoch in range(3):
        tuner.resample(epoch)
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(list(tuner.parameters()), 0.2)
        optimizer.step()
        optimizer.zero_grad()
    expected = tuner.delta()
    tuner.finish()
    assert expected.keys() == given.delta().keys()
    before = bert().state_dict()
    for name, tensor in given.model.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=0, atol=1e-4)
    changed = [name for name, tensor in given.model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert len(changed) > 3


def test_after_training_the_model_is_plain_and_the_delta_makes_it_from_the_base(tmp_path: Path) -> None:
    given = trainer(tmp_path)
    flags = [p.requires_grad for p in given.model.parameters()]
    given.train()
    model = given.model
    assert given.tuner is None
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    base = bert()
    trady.apply_delta(base, given.delta())
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), model.parameters(), strict=True))
    given.train()  # once more, from here


@pytest.mark.parametrize(
    "options", [{"save_steps": 4}, {"save_steps": 2, "draws_per_epoch": 4}], ids=["epoch", "middle"]
)
@pytest.mark.parametrize("policy", ["trady", "dynamic-norm"])
def test_a_resumed_run_ends_where_the_unbroken_one_does(tmp_path: Path, options: dict[str, Any], policy: str) -> None:
    # With more channels at a time, there are fewer sweeps in which gradients are measured.
    budget = "update:120 KiB"
    settings = {"save_strategy": "steps", "policy": policy, "num_train_epochs": 3, "budget": budget, **options}
    whole = trainer(tmp_path / "whole", bert(0.1), **settings)
    whole.train()
    again = trainer(tmp_path / "again", bert(0.1), **settings)
    first = tmp_path / "whole" / f"checkpoint-{options['save_steps'] * 3}"
    again.train(resume_from_checkpoint=str(first))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    assert whole.delta().keys() == again.delta().keys()


def test_the_best_checkpoint_is_what_remains(tmp_path: Path) -> None:
    given = trainer(
        tmp_path, eval_dataset=Rows(), save_strategy="epoch", eval_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="loss", num_train_epochs=4, learning_rate=10.0, optim="sgd", lr_scheduler_type="constant",
    )  # fmt: skip
    given.train()
    best = Path(given.state.best_model_checkpoint)
    assert best.name != "checkpoint-16"  # at this rate it does not get better to the end
    kept = load_file(best / "model.safetensors")
    assert all(torch.equal(tensor, given.model.state_dict()[name]) for name, tensor in kept.items())
    base = bert()
    trady.apply_delta(base, given.delta())
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), given.model.parameters(), strict=True))


def test_a_language_model_with_batches_of_many_lengths_is_planned_at_the_largest(tmp_path: Path) -> None:
    data = Rows(16, 6, grow=True, causal=True)
    given = trainer(tmp_path, gpt2(), data, data_collator=padded, gradient_accumulation_steps=2, budget="peak:3 MiB")
    seen: list[int] = []
    given.model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"].numel()), with_kwargs=True)
    given.train()
    assert len(set(seen)) > 1
    assert given.plan is not None
    assert given.plan.cost.elements > 0
    largest = padded([data[index] for index in range(12, 16)])
    smallest = {name: tensor[:1, :4] for name, tensor in largest.items()}
    small = trainer(tmp_path, gpt2(), data, data_collator=padded, budget="peak:1 MiB", example=smallest)
    with pytest.warns(TradyWarning, match="largest batch that training will see"):
        small.train()


def test_a_trainer_with_a_loss_of_its_own_takes_the_mixin(tmp_path: Path) -> None:
    base: Any = transformers.Trainer

    class Weighted(TradyMixin, base):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            labels = inputs.pop("labels")
            output = model(**inputs)
            loss = nn.functional.cross_entropy(output.logits, labels, torch.tensor([1.0, 2.0]))
            return (loss, output) if return_outputs else loss

    given = trainer(tmp_path, kind=Weighted, num_train_epochs=6)
    given.train()
    losses = [entry["train_loss"] for entry in given.state.log_history if "train_loss" in entry]
    assert losses[0] < 0.9
    with pytest.raises(TrainingError, match="it returns none"):
        trainer(tmp_path, kind=Weighted, policy="dynamic-norm").train()


def test_gradients_do_not_add_up_from_step_to_step_and_are_clipped_together(tmp_path: Path) -> None:
    norms: list[float] = []

    base: Any = transformers.TrainerCallback

    class Watch(base):  # type: ignore[misc]
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            found = [p.grad for p in given.tuner.parameters() if p.grad is not None]
            norms.append(float(torch.cat([g.flatten() for g in found]).norm()))

    given = trainer(tmp_path, max_grad_norm=0.05, num_train_epochs=1)
    given.add_callback(Watch())
    given.train()
    assert len(norms) == 4
    assert all(norm <= 0.05 * 1.001 for norm in norms)
    free = trainer(tmp_path, max_grad_norm=0.0, num_train_epochs=1, learning_rate=0.0)
    free.add_callback(Watch())
    norms.clear()
    given = free
    free.train()
    assert max(norms) < 4 * min(norms)  # with nothing learnt, only the rows differ


def test_what_does_not_work_is_refused_and_says_what_does(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="TrainingArguments"):
        trainer(tmp_path, optimizers=(torch.optim.SGD(bert().parameters(), lr=0.1), None)).train()
    with pytest.raises(ModelError, match="compiling the model after train"):
        trainer(tmp_path, torch_compile=True)
    with pytest.raises(TrainingError, match="draws_per_epoch is 5, and an epoch has 4 steps"):
        trainer(tmp_path, draws_per_epoch=5).train()
    with pytest.raises(StateError, match="nothing was trained"):
        trainer(tmp_path).delta()
    plain = transformers.Trainer(
        model=bert(), args=arguments(tmp_path / "plain", save_strategy="epoch"), train_dataset=Rows()
    )
    plain.train()
    with pytest.raises(CheckpointError, match="not written by a Trainer with a budget"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-4"))


def test_an_optimizer_of_a_class_of_ones_own_trains_by_channel(tmp_path: Path) -> None:
    given = trainer(tmp_path, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}))
    given.train()
    assert any("attention" in name for name in given.delta())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("stored", ["8 bits", "4 bits"])
def test_models_that_transformers_has_quantised(tmp_path: Path, stored: str) -> None:
    pytest.importorskip("bitsandbytes")
    bits = {"load_in_8bit": True} if stored == "8 bits" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    bert().save_pretrained(tmp_path / "float")
    config = transformers.BitsAndBytesConfig(**bits, llm_int8_skip_modules=["classifier"])
    kind = transformers.BertForSequenceClassification
    model, again = (kind.from_pretrained(tmp_path / "float", quantization_config=config) for _ in range(2))
    stored_before = model.bert.encoder.layer[1].intermediate.dense.weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TradyWarning)  # on some processors 4-bit weights are unpacked
        given = trainer(tmp_path, model, num_train_epochs=8, save_strategy="epoch", logging_steps=4)
        given.train()
        resumed = trainer(tmp_path / "resumed", again, num_train_epochs=8)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert all(torch.equal(resumed.delta()[name], tensor) for name, tensor in given.delta().items())
    losses = [entry["loss"] for entry in given.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    assert model.is_quantized
    assert torch.equal(model.bert.encoder.layer[1].intermediate.dense.weight, stored_before)
    assert any(name.startswith("bert.encoder") for name in given.delta())


def test_a_folder_in_use_is_refused_where_checkpoints_are_saved(tmp_path: Path) -> None:
    with locked(tmp_path):
        saving = trainer(tmp_path, max_steps=1, save_strategy="steps")
        with pytest.raises(LockedError, match=f"{tmp_path} is in use by process"):
            saving.train()
        trainer(tmp_path, max_steps=1, save_strategy="no").train()
    saving.train()
    assert not (tmp_path / ".lock").exists()
