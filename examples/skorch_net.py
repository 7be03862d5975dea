"""A skorch net, whose optimizer is adopted."""

import numpy as np
import torch
from skorch import NeuralNetClassifier
from torch import nn

import trady  # added

torch.manual_seed(0)
inputs = np.random.default_rng(0).standard_normal((128, 16)).astype(np.float32)
targets = inputs[:, :4].argmax(1)
module = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
net = NeuralNetClassifier(
    module, criterion=nn.CrossEntropyLoss, optimizer=torch.optim.AdamW, lr=3e-3, batch_size=16, max_epochs=5
).initialize()
tuner = trady.prepare(net.module_, torch.from_numpy(inputs[:16]), budget="update:100 KiB")  # added
tuner.attach(net.optimizer_)  # added
net.partial_fit(inputs, targets)
tuner.finish()  # added
