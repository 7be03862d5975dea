"""A classifier of sentences with ``transformers.Trainer``."""

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import trady  # added

config = BertConfig(
    vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, num_labels=2
)
model = BertForSequenceClassification(config)  # or from_pretrained(...)
sentences = torch.randint(4, 64, (64, 16))
data = [{"input_ids": ids, "labels": int(ids[0] > 33)} for ids in sentences]

arguments = TrainingArguments(
    "runs/example", num_train_epochs=3, learning_rate=3e-3, save_strategy="no", report_to=[], use_cpu=True
)
trainer = Trainer(model=model, args=arguments, train_dataset=data)
session = trady.tune(trainer, budget="update:200 KiB", draws_per_epoch=2)  # added
trainer.train()
print(session.plan)
print(f"{len(session.delta())} tensors have changed")
