"""Small models whose inner activations are worth computing anew: transformers, smooth convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tests.models import normal, seeded

_TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 50,
    "pad_token_id": 0,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 32}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 50,
    "max_position_embeddings": 32,
}
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Token ids without padding."""
    return torch.randint(3, 50, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(batch: int, length: int) -> Tensor:
    """An attention mask: every sample a token shorter than the one before, at least two long."""
    return (torch.arange(length) < (length - torch.arange(batch)).clamp(min=2).unsqueeze(1)).long()


class TokenBlock(nn.Module):
    """A block as timm writes it: one linear layer for queries, keys and values, attention by plain operations."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, count, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attention = (query * (width // self.heads) ** -0.5) @ key.transpose(-2, -1)
        attention = self.drop(attention.softmax(dim=-1))
        x = x + self.drop(self.proj((attention @ value).transpose(1, 2).reshape(batch, count, width)))
        return x + self.drop(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class VisionTransformer(nn.Module):
    """timm's vision transformer, in small."""

    blocks: Any

    def __init__(self, width: int = 32, depth: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.first = nn.Parameter(torch.randn(1, 1, width) / 10)
        self.blocks = nn.Sequential(*(TokenBlock(width, 4, dropout) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1)
        return self.head(self.norm(self.blocks(x))[:, 0])


class InvertedResidual(nn.Module):
    """A block of EfficientNet or MobileNetV3: expand, depthwise, squeeze and excite, project."""

    def __init__(self, width: int, activation: type[nn.Module]) -> None:
        super().__init__()
        wide = 4 * width
        self.expand, self.norm1 = nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.depthwise, self.norm2 = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide)
        self.squeeze, self.excite = nn.Conv2d(wide, wide // 4, 1), nn.Conv2d(wide // 4, wide, 1)
        self.project, self.norm3 = nn.Conv2d(wide, width, 1, bias=False), nn.BatchNorm2d(width)
        self.act = activation()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm2(self.depthwise(self.act(self.norm1(self.expand(x))))))
        y = y * torch.sigmoid(self.excite(self.act(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return x + self.norm3(self.project(y))


class SmoothConvolutions(nn.Module):
    """Two such blocks."""

    def __init__(self, activation: type[nn.Module], width: int = 8) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width)
        self.act = activation()
        self.blocks = nn.Sequential(*(InvertedResidual(width, activation) for _ in range(2)))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.act(self.norm(self.stem(x)))).mean((2, 3)))


def gpt2(**options: Any) -> nn.Module:
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), options.pop("dropout", 0.0))
    return hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2, **dropout, **options))


def bert(**options: Any) -> nn.Module:
    dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), options.pop("dropout", 0.0))
    return hf.BertForSequenceClassification(hf.BertConfig(**_TEXT, **dropout, **options))


def llama(**options: Any) -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_TEXT, num_key_value_heads=2, **options))


def _roberta() -> nn.Module:
    dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    return hf.RobertaForSequenceClassification(hf.RobertaConfig(**_TEXT, **dropout))


def _distilbert() -> nn.Module:
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 50}
    dropout = dict.fromkeys(("dropout", "attention_dropout", "seq_classif_dropout"), 0.0)
    return hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**sizes, **dropout))


def _t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 50}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, dropout_rate=0.0))


def _bart() -> nn.Module:
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    return hf.BartForConditionalGeneration(hf.BartConfig(**_BART, **ids, dropout=0.0))


def swin(drop_path_rate: float = 0.0) -> nn.Module:
    sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4]}
    options = {"window_size": 4, "num_labels": 5, "drop_path_rate": drop_path_rate}
    return hf.SwinForImageClassification(hf.SwinConfig(**sizes, **options))


def _convnext() -> nn.Module:
    sizes = {"hidden_sizes": [16, 32], "depths": [2, 1], "num_stages": 2}
    return hf.ConvNextForImageClassification(hf.ConvNextConfig(**sizes, num_labels=5))


def _efficientnet() -> nn.Module:
    sizes = {"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320, "image_size": 32}
    options = {"drop_connect_rate": 0.0, "dropout_rate": 0.0, "num_labels": 5}
    return hf.EfficientNetForImageClassification(hf.EfficientNetConfig(**sizes, **options))


def _vit() -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(**_SIZES, image_size=12, patch_size=4, num_labels=5))


def _images(size: int) -> dict[str, Tensor]:
    return {"pixel_values": normal(4, 3, size, size)}


_IDS = {"input_ids": tokens(4, 7)}
_PAIR = {"input_ids": tokens(4, 7), "decoder_input_ids": tokens(4, 5, seed=1)}

#: Every model with a batch: name -> (build, batch, the least number of segments that there must be).
RECOMPUTED: dict[str, tuple[Callable[[], nn.Module], Any, int]] = {
    "BERT": (bert, _IDS, 4),
    "BERT, eager attention": (lambda: bert(attn_implementation="eager"), _IDS, 4),
    "RoBERTa": (_roberta, _IDS, 4),
    "DistilBERT": (_distilbert, _IDS, 4),
    "GPT-2": (gpt2, _IDS, 4),
    "GPT-2, loss": (gpt2, {**_IDS, "labels": tokens(4, 7)}, 5),
    "Llama": (llama, _IDS, 4),
    "Llama, loss": (llama, {**_IDS, "labels": tokens(4, 7)}, 5),
    "Qwen2": (lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_TEXT, num_key_value_heads=2)), _IDS, 4),
    "T5": (_t5, _PAIR, 1),
    "BART": (_bart, _PAIR, 4),
    "ViT": (_vit, _images(12), 4),
    "Swin": (swin, _images(16), 6),
    "ConvNeXt": (_convnext, _images(16), 3),
    "EfficientNet": (_efficientnet, _images(32), 5),
    "EfficientNet, by hand": (lambda: SmoothConvolutions(nn.SiLU), normal(4, 3, 16, 16), 2),
    "MobileNetV3, by hand": (lambda: SmoothConvolutions(nn.Hardswish), normal(4, 3, 16, 16), 2),
    "ViT, by hand": (VisionTransformer, normal(4, 3, 12, 12), 4),
}


def recomputed_model(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """The model of that name and its batch."""
    build, batch, _ = RECOMPUTED[name]
    return seeded(build).to(dtype), cast(batch, dtype)


def cast(batch: Any, dtype: torch.dtype) -> Any:
    """A batch with its floating-point tensors in another type."""
    return tree_map(lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, batch)


def call(model: nn.Module, batch: Any) -> Any:
    """Call a model on a batch as ``prepare`` takes it."""
    return model(**batch) if isinstance(batch, dict) else model(batch)


def loss_of(batch: Any) -> Callable[[nn.Module], Tensor]:
    """The model's own loss if it has one, else a sum of squares."""

    def loss(model: nn.Module) -> Tensor:
        output = call(model, batch)
        if isinstance(output, Tensor):
            return output.square().sum()
        return output.logits.square().sum() if output.loss is None else output.loss

    return loss
