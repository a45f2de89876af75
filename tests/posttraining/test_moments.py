"""Second moments: over parts, over calls, and the errors that they foretell."""

import pytest
import torch

from proxbit.posttraining.moments import Gathered, Pair, moments


def gathered(count=4, reduce=lambda tensors: tensors, workers=2):
    pairs = [Pair(torch.randn(5 + k, 3, 6) + 2, torch.randn(5 + k, 3, 6)) for k in range(count)]
    return Gathered(pairs, workers, reduce)


def of(data, weight, centred=True):
    outputs = [pair.floating @ weight.T - 1 for pair in data.pairs]
    rows = (
        lambda k: data.pairs[k].binarized.flatten(0, 1)[:, None],
        lambda k: outputs[k].flatten(0, 1)[:, None],
    )
    x = torch.cat([pair.binarized for pair in data.pairs]).flatten(0, 1).double()
    return moments(data, *rows, centred), x, torch.cat(outputs).flatten(0, 1).double()


@pytest.mark.parametrize("centred", [True, False])
def test_they_are_those_of_all_tokens(centred):
    found, x, y = of(gathered(), torch.randn(4, 6), centred)
    mx, my = (x.mean(0), y.mean(0)) if centred else (torch.zeros(6).double(), torch.zeros(4).double())
    assert found.tokens == len(x)
    near = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found.input_mean[0], mx, **near)
    torch.testing.assert_close(found.output_mean[0], my, **near)
    torch.testing.assert_close(found.covariance[0], (x - mx).T @ (x - mx) / len(x), **near)
    torch.testing.assert_close(found.cross[0], (y - my).T @ (x - mx) / len(x), **near)
    torch.testing.assert_close(found.power[0], (y - my).square().sum() / len(x), **near)


def test_large_means_cost_no_digits():
    data = gathered()
    shifted = Gathered([Pair(pair.binarized + 1000, pair.floating) for pair in data.pairs], 1, data.reduce)
    weight = torch.randn(4, 6)
    (plain, _, _), (far, _, _) = of(data, weight), of(shifted, weight)
    torch.testing.assert_close(far.covariance, plain.covariance, rtol=2e-4, atol=2e-4)


def test_the_error_is_the_error():
    data, weight = gathered(), torch.randn(4, 6)
    found, x, y = of(data, weight)
    q, bias = torch.randn(4, 6).double(), torch.randn(4).double()
    power = (y - y.mean(0)).square().sum(1).mean()
    expected = (y - x @ q.T - bias).square().sum(1).mean() / power
    assert found.error(q[None], bias[None]) == pytest.approx(float(expected), rel=1e-5)
    best = y.mean(0) - q @ x.mean(0)
    expected = (y - x @ q.T - best).square().sum(1).mean() / power
    assert found.error(q[None], None) == pytest.approx(float(expected), rel=1e-5)


def test_two_calls_are_one_with_all_tokens():
    one, other, weight = gathered(3), gathered(2), torch.randn(4, 6)
    both = Gathered([*one.pairs, *other.pairs], 2, one.reduce)
    joined = of(one, weight)[0].joined(of(other, weight)[0])
    whole = of(both, weight)[0]
    assert joined.tokens == whole.tokens and whole.joined(None) is whole
    for name in ("input_mean", "output_mean", "covariance", "cross", "power"):
        torch.testing.assert_close(getattr(joined, name), getattr(whole, name), rtol=1e-5, atol=1e-5)


def test_sums_go_over_processes():
    """Two processes with the same images know twice as many tokens, and the same moments."""
    data, weight = gathered(), torch.randn(4, 6)
    twice = Gathered(data.pairs, 1, lambda tensors: [2 * each for each in tensors])
    one, two = of(data, weight)[0], of(twice, weight)[0]
    assert two.tokens == 2 * one.tokens
    torch.testing.assert_close(two.covariance, one.covariance)
