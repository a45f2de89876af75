"""The theorem of ProxConnect++: with a sound pair, the step is that of ProxConnect on the loss after T."""

import pytest
import torch

from pair_formulas import ROWS
from proxbit.quantizers import MuSchedule, get_pair, quantize

# The rate is below 2 / curvature for the sharpest T: beyond it, rounding grows from step to step as in any dynamics.
STEPS, RATE = 250, 5e-4
SOUND = {name: (name, None) for name, row in ROWS.items() if row[2] is not None}
SOUND |= {"pc-ternary": ("pc", {"levels": [-1, 0, 1]}), "pc-two-bit": ("pc", {"levels": [-1.5, -0.5, 0.5, 1.5]})}


def iterates(name, gradient):
    """Latent weights after each step of gradient descent; mu moves along the default schedule."""
    pair = get_pair(*SOUND[name])
    schedule = MuSchedule(*pair.schedule, steps=STEPS)
    generator = torch.Generator().manual_seed(0)
    data, start, target = (
        torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((40, 12), (3, 12), (40, 3))
    )
    latent, kept = 0.5 * start, []
    for step in range(STEPS):
        mu = torch.tensor(schedule.mu(step), dtype=torch.float64)
        slope = gradient(pair, latent, mu, lambda weight: ((data @ weight.T - target) ** 2).sum() / (2 * len(data)))
        latent = latent - RATE * slope
        kept.append(latent)
    return torch.stack(kept)


def of_the_layer(pair, latent, mu, loss):
    """What a layer does: F forward, B times the gradient backward."""
    latent = latent.clone().requires_grad_()
    loss(quantize(latent, mu, pair, normalize="none", scale="fixed")).backward()
    return latent.grad


def of_proxconnect(pair, latent, mu, loss):
    """p = P(w*), then the gradient of l(T(p)) at p: T is differentiated by autograd, not by its own derivative."""
    p = pair.proximal(latent, mu).detach().requires_grad_()
    loss(pair.transform(p, mu)).backward()
    return p.grad


@pytest.mark.parametrize("name", SOUND)
def test_every_sound_pair_is_proxconnect_on_the_loss_after_its_transform(name):
    one, other = iterates(name, of_the_layer), iterates(name, of_proxconnect)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert float((one[-1] - one[0]).abs().max()) > 0.05


def test_a_heuristic_pair_is_not():
    """BNN+ has the gradient of BNN++ and another forward: its steps are not those of any loss after sign-Swish."""

    def heuristic(pair, latent, mu, loss):
        return of_the_layer(get_pair("bnn+"), latent, mu, loss)

    difference = iterates("bnn++", of_the_layer) - iterates("bnn++", heuristic)
    assert float(difference.abs().max()) > 0.01
