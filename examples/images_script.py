"""A training script with a loop of its own, as those of timm and torchvision: autocast, accumulation, a schedule."""

import torch
from torch import nn

import trady  # added

torch.manual_seed(0)
model = nn.Sequential(  # timm.create_model(...), torchvision.models.segmentation.fcn_resnet50(...)
    nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
    nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
)  # fmt: skip
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
images = torch.randn(64, 3, 32, 32)
labels = images.mean((1, 2, 3)).mul(60).long().remainder(4)

tuner = trady.prepare(model, images[:8], budget="update:1 MiB", accumulates=True, autocast=torch.bfloat16)  # added
optimizer = tuner.attach(optimizer)  # added
for epoch in range(10):
    tuner.resample(epoch)  # optional: other channels in each epoch
    for start in range(0, 64, 8):
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(images[start : start + 8]), labels[start : start + 8]) / 2
        loss.backward()
        if start % 16:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    print(f"epoch {epoch}: loss {2 * loss.item():.3f}")
tuner.finish()  # added
