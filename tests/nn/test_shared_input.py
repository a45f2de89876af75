"""Packed layers that share the reading of their input."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from proxbit.errors import ConfigError
from proxbit.kernels import native
from proxbit.nn import PackedLinear, SharedInput
from proxbit.packing import pack_signs

WIDTH, SIZES = 40, (30, 64, 7)


def layer(size, columns=WIDTH, bias=True, **arguments):
    new = PackedLinear(columns, size, bias, **arguments)
    new.weight.copy_(pack_signs(torch.randn(size, columns)))
    new.weight_scale.uniform_(0.5, 1.5)
    if bias:
        torch.nn.init.normal_(new.bias).requires_grad_(False)
    return new


def group(activations="int8", bias=True):
    layers = [layer(size, bias=bias, activations=activations) for size in SIZES]
    shared = SharedInput(layers)
    return layers, shared


def share(layers, shared):
    for each in layers:
        each.shared = shared


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_the_same_results(activations, bias):
    layers, shared = group(activations, bias)
    x, y = torch.randn(2, 5, WIDTH), torch.randn(3, WIDTH)
    expected = [[each(values) for each in layers] for values in (x, y)]
    share(layers, shared)
    for values, alone in zip((x, y), expected, strict=True):
        for each, result in zip(layers, alone, strict=True):
            torch.testing.assert_close(each(values), result, rtol=1e-6, atol=1e-6)


def test_other_orders_and_other_inputs():
    """Only what the first layer left for the very same tensor is used, and only once."""
    layers, shared = group()
    x, y = torch.randn(2, WIDTH), torch.randn(2, WIDTH)
    expected = {(i, j): layers[i](values) for i in range(3) for j, values in enumerate((x, y))}
    share(layers, shared)
    for order in [(2, 0), (0, 0), (2, 1), (1, 0), (1, 0), (0, 1), (0, 0), (1, 1), (2, 0), (2, 0)]:
        assert torch.equal(layers[order[0]]((x, y)[order[1]]), expected[order])


def test_changed_weights_are_seen():
    layers, shared = group()
    share(layers, shared)
    x = torch.randn(2, WIDTH)
    [each(x) for each in layers]
    for each in layers:
        each.weight.copy_(pack_signs(torch.randn(each.out_features, WIDTH)))
        each.weight_scale.mul_(2)
    together = [each(x) for each in layers]
    share(layers, None)
    assert all(torch.equal(each(x), result) for each, result in zip(layers, together, strict=True))


def test_changed_weights_are_seen_where_changes_are_not_counted():
    with torch.inference_mode():
        layers, shared = group()
        share(layers, shared)
        x = torch.randn(2, WIDTH)
        [each(x) for each in layers]
        for each in layers:
            each.weight.copy_(pack_signs(torch.randn(each.out_features, WIDTH)))
        together = [each(x) for each in layers]
        share(layers, None)
        assert all(torch.equal(each(x), result) for each, result in zip(layers, together, strict=True))


def test_an_input_that_changes_between_the_calls():
    layers, shared = group()
    share(layers, shared)
    x = torch.randn(2, WIDTH)
    layers[0](x)
    changed = layers[1](x.mul_(2))
    assert not torch.equal(changed, layers[1](x / 2))
    share(layers, None)
    assert torch.equal(changed, layers[1](x))


def test_in_inference_mode_the_layers_share_and_the_weight_is_laid_out_once(monkeypatch):
    layers, shared = group()
    share(layers, shared)
    kernels = native()
    laid, repack = [], kernels.library.proxbit_repack
    monkeypatch.setattr(kernels.library, "proxbit_repack", lambda *arguments: laid.append(repack(*arguments)))
    with torch.inference_mode():
        for _ in range(3):
            x = torch.randn(2, WIDTH)
            together = [each(x) for each in layers]
    assert len(laid) <= 1
    share(layers, None)
    assert all(torch.equal(each(x), result) for each, result in zip(layers, together, strict=True))


def test_copies_and_threads():
    layers, shared = group()
    expected = {}
    inputs = [torch.randn(3, WIDTH) for _ in range(16)]
    for index, x in enumerate(inputs):
        expected[index] = [each(x) for each in layers]
    share(layers, shared)
    twins = copy.deepcopy(layers)
    assert twins[0].shared is not shared
    assert twins[0].shared.layers[0] is twins[0]

    def work(index):
        return [[each(inputs[index]) for each in who] for who in (layers, twins)]

    with ThreadPoolExecutor(4) as pool:
        for index, results in enumerate(pool.map(work, range(16))):
            for result in results:
                assert all(torch.equal(a, b) for a, b in zip(result, expected[index], strict=True))


@pytest.mark.parametrize(
    "layers",
    [
        lambda: [layer(3)],
        lambda: [layer(3), layer(3, columns=8)],
        lambda: [layer(3), layer(3, bias=False)],
        lambda: [layer(3), layer(3, activations="int8")],
        lambda: [layer(3, offset=True), layer(3, offset=True)],
    ],
    ids=["one", "widths", "bias", "activations", "offset"],
)
def test_layers_that_do_not_fit(layers):
    with pytest.raises(ConfigError, match="Layers that share an input have the same width"):
        SharedInput(layers())
