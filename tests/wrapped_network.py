"""A small network, and a ProxConnect of its two weights."""

import torch
from torch import nn

from proxbit.optim import ProxConnect

__all__ = ["OPTIMIZERS", "backward", "groups", "network", "wrapped"]

OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(27, 9), nn.ReLU(), nn.Linear(9, 3)).double()


def groups(model):
    return [{"params": [model[0].weight, model[2].weight]}, {"params": [model[0].bias, model[2].bias]}]


def wrapped(model, pair="bnn++", optimizer="sgd", **arguments):
    return ProxConnect(OPTIMIZERS[optimizer](groups(model)), pair, [model[0].weight, model[2].weight], **arguments)


def backward(model, data):
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(data[0]), data[1])
    loss.backward()
    return loss.item()
