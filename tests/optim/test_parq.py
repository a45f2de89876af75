"""Step by step beside the `QuantOptimizer` of torchao, which takes the same step with another code.

What differs between the two, and how it is met here:

- QuantOptimizer first applies its map after the first step of the base optimizer, so that its first gradient is taken
  at the float weights. A `ProxConnect` that is made after one step of the base optimizer is the same.
- Its map clips to the levels; its target levels are kept in the default dtype of torch, so that is float64 here.
- Its relaxation theta is linear in the step: mu = theta / (1 - theta). Its slopes become infinite at the end.

Training amplifies the last bits in which two codes differ, the more the steeper the map (a slope of 2600 at the end of
`parq`): a small learning rate keeps that below the tolerance.
"""

from types import SimpleNamespace

import pytest
import torch
from torchao.prototype.parq.optim import ProxBinaryRelax, ProxHardQuant, ProxPARQ, QuantOptimizer
from torchao.prototype.parq.quant import LSBQuantizer

from proxbit.optim import ProxConnect
from proxbit.quantizers import MuSchedule
from tiny_models import FAMILIES, LABELS, SIDE

STEPS = 200
END = 180


def relaxation(step):
    theta = step / END
    return theta / (1 - theta) if step < END else 1.0


# Our pair with its schedule, and the map of the peer.
ARMS = {
    "bc": (MuSchedule("constant", 1, 1, STEPS), ProxHardQuant()),
    "binaryrelax": (
        SimpleNamespace(steps=STEPS, mu=relaxation, is_hard=lambda step: step >= END),
        ProxBinaryRelax(anneal_start=0, anneal_end=END),
    ),
    "parq": (
        MuSchedule("sigmoid", 1, 1e16, STEPS, hard_fraction=(STEPS - END - 1) / STEPS),
        ProxPARQ(anneal_start=0, anneal_end=END, steepness=10),
    ),
}


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def training(crops):
    """A vision transformer of two layers, AdamW with the matrices of its layers in a group of their own, a closure."""
    torch.manual_seed(0)
    model = FAMILIES["vit"]().double()
    pixels, labels = crops(3, SIDE).double(), torch.arange(3) % LABELS
    matrices = [p for name, p in model.named_parameters() if name.startswith("vit.layers.") and p.dim() == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    groups = [{"params": matrices, "quant_bits": 1}, {"params": others}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.01, eps=1e-6)

    def backward():
        model.zero_grad()
        model(pixels, labels=labels).loss.backward()

    return model, matrices, optimizer, backward


@pytest.mark.parametrize("name", ARMS)
def test_two_hundred_steps_agree(name, crops, double):
    schedule, prox_map = ARMS[name]
    ours, matrices, optimizer, backward = training(crops)
    peer, peer_matrices, peer_optimizer, peer_backward = training(crops)
    quant = QuantOptimizer(peer_optimizer, LSBQuantizer(), prox_map, quant_period=1, quant_per_channel=True)
    start = [matrix.detach().clone() for matrix in matrices]
    for step in range(STEPS):
        backward()
        optimizer.step()
        if step == 0:
            optimizer = ProxConnect(optimizer, name, matrices, schedule=schedule, normalize="row", scale="fixed")
        peer_backward()
        quant.step()
        for mine, theirs in zip(ours.parameters(), peer.parameters(), strict=True):
            assert (mine - theirs).abs().max() <= 1e-6
    for dual, matrix in zip(optimizer.duals, peer_matrices, strict=True):
        torch.testing.assert_close(dual.latent, quant.state[matrix]["latent"], rtol=0, atol=1e-6)
    flipped = sum(((old >= 0) != (new >= 0)).sum() for old, new in zip(start, matrices, strict=True))
    assert flipped > 100
