"""Architectures of timm, one or two a family, without weights, on small images.

What is wide in every variant is built with fewer blocks or channels, by the library's own settings.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.tasks import CrossEntropy, Task, needs, seeded

#: By the side of the images, the architectures.
SIZES = {
    32: "lcnet_050 mobilenetv3_small_050 tinynet_e",
    64: """
        beit_base_patch16_224 cait_xxs24_224 convnext_atto convnextv2_atto davit_tiny
        deit3_small_patch16_224 densenet121 dla34 dpn48b edgenext_xx_small efficientnet_b0 efficientvit_b0
        ese_vovnet19b_dw eva02_tiny_patch14_224 fastvit_t8 focalnet_tiny_srf gernet_s ghostnet_050 gmlp_s16_224
        hgnetv2_b0 hrnet_w18_small inception_next_atto legacy_seresnet18 mambaout_femto mixer_s32_224 mnasnet_small
        mobilenetv4_conv_small mobileone_s0 nf_resnet26 nfnet_l0 poolformer_s12 pvt_v2_b0 regnetx_002 regnety_002
        repvgg_a0 resmlp_12_224 resnest14d resnet18 resnetv2_50x1_bit rexnet_100 selecsls42b skresnet18 starnet_s1
        swiftformer_xs tresnet_m twins_pcpvt_small twins_svt_small vit_tiny_patch16_224 xception41
    """,
    96: "inception_v3",
    128: "hiera_tiny_224 swin_tiny_patch4_window7_224 swinv2_tiny_window8_256",
    224: "coatnet_pico_rw_224 efficientformer_l1 levit_128s maxvit_pico_rw_256 nest_tiny visformer_tiny",
}

#: Architectures that are told the size of their images.
TOLD = """
    beit_base_patch16_224 cait_xxs24_224 deit3_small_patch16_224 eva02_tiny_patch14_224 gmlp_s16_224 hiera_tiny_224
    mixer_s32_224 resmlp_12_224 swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 twins_pcpvt_small twins_svt_small
    vit_tiny_patch16_224
"""

#: What makes an architecture small.
OWN: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": {"embed_dim": 96, "depth": 3, "num_heads": 3},
    "cait_xxs24_224": {"depth": 4},
    "davit_tiny": {"depths": (1, 1, 1, 1), "embed_dims": (24, 48, 96, 192), "num_heads": (1, 2, 4, 8)},
    "deit3_small_patch16_224": {"embed_dim": 96, "depth": 3, "num_heads": 3},
    "densenet121": {"block_config": (2, 2, 2, 2)},
    "hiera_tiny_224": {"embed_dim": 24, "stages": (1, 1, 2, 1)},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1, 2, 1), "embed_dim": 24, "window_size": 4},
    "swinv2_tiny_window8_256": {"depths": (1, 1, 2, 1), "embed_dim": 24, "window_size": 4, "num_heads": (2, 4, 8, 8)},
    "twins_pcpvt_small": {"depths": (1, 1, 2, 1)},
    "twins_svt_small": {"depths": (1, 1, 2, 1)},
    "vit_tiny_patch16_224": {"depth": 4},
}

NAMES = tuple(name for names in SIZES.values() for name in names.split())


def task_of(architecture: str) -> Task:
    """Build the model, and a batch with labels."""
    timm = needs("timm", "timm torchvision")
    size = next(size for size, names in SIZES.items() if architecture in names.split())
    size = int(architecture[-3:]) if size == 224 and architecture[-3:] in ("240", "256") else size
    settings = dict(OWN.get(architecture, {}))
    if architecture in TOLD.split():
        settings["img_size"] = 56 if architecture == "eva02_tiny_patch14_224" else size
    model = seeded(lambda: timm.create_model(architecture, pretrained=False, num_classes=5, **settings))
    size = settings.get("img_size", size)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    return Task(model, images, CrossEntropy(torch.tensor([0, 4])))
