"""A Lightning module with a budget, stopped and resumed from its checkpoint."""

import tempfile

import lightning.pytorch as pl
import torch
from torch import nn

from trady.integrations.lightning import TradyCallback  # added


class Task(pl.LightningModule):
    """A small convolutional classifier."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
        )  # fmt: skip

    def training_step(self, batch, index):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


torch.manual_seed(1)
images = torch.randn(64, 3, 16, 16)
data = torch.utils.data.DataLoader(
    torch.utils.data.TensorDataset(images, images.mean((1, 2, 3)).mul(40).long().remainder(4)), batch_size=8
)
with tempfile.TemporaryDirectory() as folder:
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "default_root_dir": folder}
    trainer = pl.Trainer(max_epochs=1, callbacks=[TradyCallback(budget="update:1 MiB")], **options)  # added
    trainer.fit(Task(), data)
    path = trainer.checkpoint_callback.best_model_path
    callback = TradyCallback(budget="update:1 MiB")
    trainer = pl.Trainer(max_epochs=3, callbacks=[callback], **options)
    trainer.fit(Task(), data, ckpt_path=path)
    print(f"{len(callback.delta())} tensors have changed")
