"""A segmentation script as torchvision's reference one: two classifiers, their loss, a polynomial schedule."""

import torch
import torch.nn.functional as F
from torch import nn

import trady  # added

try:
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large
except (ImportError, RuntimeError):  # torchvision imports beside its own build of PyTorch alone
    lraspp_mobilenet_v3_large = None


class Small(nn.Module):
    """Stands for torchvision's where that is missing: a mapping of scores for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()
        )
        self.classifier, self.aux_classifier = nn.Conv2d(32, 3, 1), nn.Conv2d(32, 3, 1)

    def forward(self, x):
        features = self.backbone(x)
        scores = {"out": self.classifier(features), "aux": self.aux_classifier(features)}
        return {name: F.interpolate(score, size=x.shape[-2:], mode="bilinear") for name, score in scores.items()}


def criterion(outputs, target):
    losses = {name: F.cross_entropy(scores, target, ignore_index=255) for name, scores in outputs.items()}
    return losses["out"] + 0.5 * losses["aux"] if "aux" in losses else losses["out"]


torch.manual_seed(0)
if lraspp_mobilenet_v3_large is None:
    model = Small()
else:
    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
images = torch.randn(16, 3, 64, 64)
target = (images.mean(1) > 0.3).long() + (images.mean(1) > 0).long()
batches = list(zip(images.split(4), target.split(4), strict=True))
epochs = 2

optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
tuner = trady.prepare(model, batches[0][0], budget="elements:100000")  # added
optimizer = tuner.attach(optimizer)  # added
scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=len(batches) * epochs, power=0.9)

for epoch in range(epochs):
    tuner.resample(epoch)  # optional: other channels in each epoch
    model.train()
    for image, classes in batches:
        loss = criterion(model(image), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    print(f"epoch {epoch}: loss {loss.item():.3f}")

tuner.finish()  # added
torch.save(model.state_dict(), "segmentation.pt")
