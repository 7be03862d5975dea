"""A loop on Accelerate: accumulation, clipping, and a state that is saved and loaded."""

import tempfile

import torch
from accelerate import Accelerator
from torch import nn

import trady  # added

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
inputs = torch.randn(64, 16)
targets = inputs[:, :4].argmax(1)
data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, targets), batch_size=8)

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
model, optimizer, data = accelerator.prepare(model, optimizer, data)
tuner = trady.prepare(model, inputs[:8], budget="update:100 KiB", accumulates=True)  # added
tuner.attach(optimizer)  # added
accelerator.register_for_checkpointing(tuner)  # added

for epoch in range(4):
    tuner.resample(epoch)
    for batch, labels in data:
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(batch), labels)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    print(f"epoch {epoch}: loss {loss.item():.3f}")
with tempfile.TemporaryDirectory() as folder:
    accelerator.save_state(folder)
    accelerator.load_state(folder)
tuner.finish()
