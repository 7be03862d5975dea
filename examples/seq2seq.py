"""A T5 with ``Seq2SeqTrainer``, which generates to evaluate."""

import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, T5Config, T5ForConditionalGeneration

import trady  # added

config = T5Config(
    vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
)
model = T5ForConditionalGeneration(config)  # or from_pretrained(...)
numbers = torch.randint(4, 64, (48, 8))
data = [{"input_ids": ids, "labels": ids.flip(0)} for ids in numbers]


def exact(prediction):
    """Share of sequences that were reversed without a mistake."""
    made = prediction.predictions[:, 1:9]
    return {"exact": float((made == prediction.label_ids[:, : made.shape[1]]).all(1).mean())}


arguments = Seq2SeqTrainingArguments(
    "runs/example", num_train_epochs=2, learning_rate=3e-3, save_strategy="no", report_to=[], use_cpu=True,
    eval_strategy="epoch", predict_with_generate=True, generation_max_length=10,
)  # fmt: skip
trainer = Seq2SeqTrainer(model=model, args=arguments, train_dataset=data, eval_dataset=data, compute_metrics=exact)
trady.tune(trainer, budget="update:200 KiB")  # added
trainer.train()
