"""Architectures of transformers, built from their configurations with random weights, in small.

Two layers and 32 features where they have such settings. Sizes alone are set: dropout, layers that are left out at
random and masked features are as the library has them.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.tasks import Task, needs, own_loss, seeded

#: By class of transformers, the architectures.
TASKS = {
    "AutoModelForCausalLM": """
        apertus bitnet biogpt bloom codegen cohere cohere2 deepseek_v2 deepseek_v3 diffllama ernie4_5 exaone4 falcon
        falcon_mamba gemma gemma2 gemma3_text glm glm4 gpt_bigcode gpt_neo gpt_neox gpt_oss gptj gpt2 granite granitemoe
        helium lfm2 llama mamba mamba2 mistral mixtral mpt nemotron olmo olmo2 olmoe openai-gpt opt persimmon phi phi3
        qwen2 qwen2_moe qwen3 qwen3_moe recurrent_gemma rwkv seed_oss smollm3 stablelm starcoder2 xglm xlnet
    """,
    "AutoModelForSequenceClassification": """
        albert bert big_bird camembert canine convbert data2vec-text deberta deberta-v2 distilbert electra ernie esm
        eurobert flaubert fnet funnel ibert layoutlm longformer luke megatron-bert mobilebert modernbert mpnet
        nystromformer rembert roberta roberta-prelayernorm roc_bert roformer squeezebert xlm xlm-roberta xlm-roberta-xl
    """,
    "AutoModelForSeq2SeqLM": """
        bart bigbird_pegasus blenderbot blenderbot-small led longt5 m2m_100 marian mbart mt5 pegasus pegasus_x plbart
        switch_transformers t5 umt5
    """,
    "AutoModelForImageClassification": """
        beit data2vec-vision dinov2 dinov2_with_registers focalnet ijepa mobilenet_v1 mobilenet_v2 poolformer pvt pvt_v2
        regnet resnet segformer swin swinv2 vit vit_msn
    """,
    "AutoModelForAudioClassification": "data2vec-audio hubert sew unispeech wav2vec2 wavlm whisper",
}

#: Samples of audio that are too few to mask features in, and those that are not.
AUDIO, LONG_AUDIO, NEEDS_LONG_AUDIO = 800, 8000, ("data2vec-audio", "sew", "unispeech")

_WIDTHS = """
    hidden_size n_embd d_model embed_dim embedding_size word_embed_proj_dim moe_intermediate_size
    shared_expert_intermediate_size emb_dim
"""
_LAYERS = "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers"
_HEADS = """
    num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts
    num_local_experts n_routed_experts rotary_dim
"""
_WIDE = "intermediate_size n_inner d_ff encoder_ffn_dim decoder_ffn_dim ffn_dim d_inner"
_LENGTHS = "max_position_embeddings n_positions max_source_positions max_target_positions max_seq_len"
SETTINGS: dict[str, Any] = {
    **dict.fromkeys(_WIDTHS.split(), 32),
    **dict.fromkeys(_LAYERS.split(), 2),
    **dict.fromkeys(_HEADS.split(), 4),
    **dict.fromkeys(_WIDE.split(), 64),
    **dict.fromkeys(_LENGTHS.split(), 64),
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "vocab_size": 120,
    "d_kv": 8,
    "d_head": 8,
    "head_dim": 8,
    "image_size": 32,
    "patch_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_DEEPSEEK = {**_MLA, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4}
_STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32]}
_SPEECH = {
    "conv_dim": [16, 16],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 16,
}
_SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "patch_size": 4}

#: What an architecture needs besides, to be small or to be built at all.
OWN: dict[str, dict[str, Any]] = {
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "esm": {"mask_token_id": 3, "position_embedding_type": "rotary"},
    "flaubert": {"n_heads": 4},
    "focalnet": {"embed_dim": 16, "depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 64, 128], "patch_size": 4},
    "funnel": {"block_sizes": [1, 1]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gpt_oss": {"sliding_window": 8},
    "hubert": _SPEECH,
    "lfm2": {"block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"]},
    "longformer": {"attention_window": 8},
    "led": {"attention_window": 8},
    "mamba": {"state_size": 8, "expand": 2, "conv_kernel": 4, "time_step_rank": 4},
    "mamba2": {"state_size": 8, "expand": 2, "head_dim": 16, "num_heads": 4, "n_groups": 1, "chunk_size": 8},
    "mobilebert": {"true_hidden_size": 32, "intra_bottleneck_size": 32, "num_feedforward_networks": 2},
    "nystromformer": {"num_landmarks": 8, "segment_means_seq_len": 16},
    "poolformer": {**_STAGES, "patch_size": 7},
    "pvt": {**_STAGES, "num_attention_heads": [1, 2, 3, 4], "patch_sizes": [4, 2, 2, 2]},
    "pvt_v2": {**_STAGES, "num_attention_heads": [1, 2, 3, 4]},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8},
    "regnet": {**_STAGES, "embedding_size": 8, "groups_width": 8},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32},
    "resnet": {**_STAGES, "embedding_size": 8},
    "segformer": {**_STAGES, "num_attention_heads": [1, 2, 3, 4], "decoder_hidden_size": 16},
    "swin": _SWIN,
    "swinv2": _SWIN,
    "wav2vec2": _SPEECH,
    "wavlm": _SPEECH,
    "whisper": {"num_mel_bins": 16, "classifier_proj_size": 16},
}


#: All of them.
NAMES: tuple[str, ...] = tuple(name for names in TASKS.values() for name in names.split())


def task_of(architecture: str) -> Task:
    """Build the small model, and a batch with labels."""
    hf = needs("transformers", "transformers")
    hf.logging.set_verbosity_error()
    family = next(auto for auto, names in TASKS.items() if architecture in names.split())
    made = hf.CONFIG_MAPPING[architecture]
    usual, other_names = made(), getattr(made, "attribute_map", {})
    settings = {
        name: value
        for name, value in SETTINGS.items()
        if (name in usual.to_dict() or name in other_names)
        and other_names.get(name) not in SETTINGS
        and not isinstance(getattr(usual, name, None), (list, tuple, dict))
    }
    labels = {"num_labels": 5, "decoder_start_token_id": 1}
    config = made(**{**settings, **OWN.get(architecture, {}), **labels})
    config.use_cache = False
    model = seeded(lambda: getattr(hf, family).from_config(config, trust_remote_code=False).float())
    ids = torch.randint(3, 110, (2, 16), generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([0, 4])
    batches: dict[str, Any] = {
        "AutoModelForCausalLM": {"input_ids": ids, "labels": ids},
        "AutoModelForSequenceClassification": {"input_ids": ids, "labels": classes},
        "AutoModelForSeq2SeqLM": {"input_ids": ids, "labels": ids.flip(1)[:, :8].contiguous()},
    }
    batch = batches.get(family)
    if batch is None:
        size = getattr(config, "image_size", None)
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {
            "AutoModelForImageClassification": ("pixel_values", (3, 32, 32) if size == 32 else (3, 64, 64)),
            "AutoModelForAudioClassification": (
                "input_values",
                (LONG_AUDIO if architecture in NEEDS_LONG_AUDIO else AUDIO,),
            ),
        }
        name, shape = ("input_features", (16, 128)) if architecture == "whisper" else shapes[family]
        batch = {name: torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)), "labels": classes}
    return Task(model, batch, own_loss)
