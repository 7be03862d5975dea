"""Sentence embeddings with sentence-transformers: a loss of two forward passes."""

import tempfile

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss
from sentence_transformers.models import Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import trady  # added

words = ["<pad>", "<unk>", "the", "a", "cat", "dog", "feline", "hound", "sleeps", "rests", "runs", "hurries"]
made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
config = BertConfig(
    vocab_size=len(words), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
)
with tempfile.TemporaryDirectory() as folder:  # a model of yours: SentenceTransformer("all-MiniLM-L6-v2")
    BertModel(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    model = SentenceTransformer(modules=[Transformer(folder), Pooling(64)], device="cpu")
pairs = {"anchor": ["the cat sleeps", "a dog runs"] * 16, "positive": ["the feline rests", "a hound hurries"] * 16}

arguments = SentenceTransformerTrainingArguments(
    "runs/example", num_train_epochs=2, learning_rate=1e-3, save_strategy="no", report_to=[], use_cpu=True
)
trainer = SentenceTransformerTrainer(
    model=model, args=arguments, train_dataset=Dataset.from_dict(pairs), loss=MultipleNegativesRankingLoss(model)
)
trady.tune(trainer, budget="update:200 KiB")  # added
trainer.train()
