"""A training step to be measured."""

from torch import nn

FLOAT = 4


def net(**options):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, **options),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, **options),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 8 * 8, 10, **options),
    )


def weight_bytes(model):
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


class Step:
    """A step of a model, with what a test may want to vary."""

    def __init__(self, model, batch, optimizer=None, loss=None):
        self.model, self.batch, self.optimizer = model, batch, optimizer
        self.loss = loss or (lambda output: output.square().mean())

    def __call__(self):
        self.loss(self.model(self.batch)).backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
