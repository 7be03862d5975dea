"""Supervised fine-tuning of a Llama with TRL, packed."""

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import trady  # added

words = ["<pad>", "<s>", "</s>", "<unk>", "the", "a", "cat", "dog", "sees", "hears", "and", "then", "sleeps", "runs"]
made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
)
config = LlamaConfig(
    vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
model = LlamaForCausalLM(config)  # or from_pretrained(...)
data = Dataset.from_dict({"text": ["the cat sees a dog and then runs", "a dog hears the cat and then sleeps"] * 32})

arguments = SFTConfig(
    "runs/example", num_train_epochs=2, learning_rate=3e-3, max_length=32, packing=True, save_strategy="no",
    report_to=[], use_cpu=True, bf16=False,
)  # fmt: skip
trainer = SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
trady.tune(trainer, budget="update:200 KiB")  # added
trainer.train()
