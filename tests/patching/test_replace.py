"""Changing layers in place: what is kept, what becomes of the weights, and that an error changes nothing."""

import copy

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn

from proxbit.config import BinarizationConfig
from proxbit.errors import ConfigError, LatentError, ModelStateError, PackedFormatError, PatternError
from proxbit.nn import BinaryConv2d, BinaryLinear, PackedConv2d, PackedLinear, set_mu, soft_evaluation
from proxbit.patching import check_latents, check_packed_layers, packed_layers, to_float, to_latent, to_packed
from tiny_models import vit

LAST = "vit.layers.1.mlp.fc2"
FIRST = "vit.layers.0.attention.q_proj"
PATCHES = "vit.embeddings.patch_embeddings.projection"
EVERYTHING = BinarizationConfig(include=["*"])


@pytest.fixture
def model():
    return hf.ViTForImageClassification(vit()).eval()


def snapshot(model):
    """Everything a conversion could change: classes, identities, values, modes and attributes of the top."""
    classes = {name: (type(module), id(module), module.training) for name, module in model.named_modules()}
    values = {name: (id(tensor), tensor.detach().numpy().tobytes()) for name, tensor in model.named_parameters()}
    return classes, values, list(model.state_dict()), sorted(vars(model)), model.config.to_json_string()


def spoil(model, name, value):
    """Make a latent or float weight one that cannot be binarized: row 2 holds `value`."""
    row = model.get_submodule(name).weight.detach()[2]
    row[...] = 0 if value == 0 else row
    row.view(-1)[1] = value


def hard_weight(weight, normalize, scale):
    """Signs times the scale of each row, from the formulas, in double precision."""
    rows = weight.detach().double().numpy().reshape(len(weight), -1)
    signs = np.where(rows >= 0, 1.0, -1.0)
    fixed = {
        "row": np.abs(rows).mean(axis=1),
        "tensor": np.full(len(rows), np.abs(rows).mean()),
        "none": np.ones(len(rows)),
    }[normalize]
    least_squares = (signs * rows).sum(axis=1) / rows.shape[1]
    factor = {"ls": least_squares, "fixed": fixed}[scale]
    return torch.from_numpy((signs * factor[:, None]).reshape(weight.shape)).float()


def test_latent_layers_own_the_parameters(model):
    """Classes change; parameters, their names and their order do not."""
    before = dict(model.named_parameters())
    report, _ = to_latent(model, EVERYTHING)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    kinds = {name: type(model.get_submodule(name)) for name in report.converted}
    assert kinds.pop(PATCHES) is BinaryConv2d
    assert set(kinds.values()) == {BinaryLinear}
    assert len(kinds) == 13


def test_the_resolved_configuration_names_the_selection(model):
    """Defaults and exclusions become explicit patterns, so that a checkpoint does not depend on the defaults."""
    config = BinarizationConfig(modules_to_not_convert=["*.fc1"], weights="parq", normalize="tensor")
    twin = copy.deepcopy(model)
    report, resolved = to_latent(model, config)
    assert resolved.modules_to_not_convert is None
    assert resolved == config.replace(include=resolved.include, modules_to_not_convert=None, learned_attention=[])
    again, resolved_again = to_latent(twin, resolved)
    assert again.converted == report.converted
    assert resolved_again == resolved
    assert config == BinarizationConfig(modules_to_not_convert=["*.fc1"], weights="parq", normalize="tensor")


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_conversions_keep_the_mode(model, training):
    model.train(training)
    for convert in (lambda: to_latent(model, EVERYTHING), lambda: to_packed(model), lambda: to_float(model)):
        convert()
        assert {module.training for module in model.modules()} == {training}


def test_frozen_weights_stay_frozen(model):
    for name in (FIRST, PATCHES):
        model.get_submodule(name).weight.requires_grad_(False)
    to_latent(model, EVERYTHING)
    to_float(model)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {f"{FIRST}.weight", f"{PATCHES}.weight"}


@pytest.mark.parametrize(("normalize", "scale"), [("row", "ls"), ("row", "fixed"), ("tensor", "fixed"), ("none", "ls")])
def test_float_layers_hold_signs_and_scales(model, normalize, scale):
    """From latent and from packed layers alike; zeros count as positive."""
    for name in (FIRST, PATCHES):
        model.get_submodule(name).weight.detach()[0].view(-1)[:2] = torch.tensor([0.0, -0.0])
    names = [name for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    expected = {name: hard_weight(model.get_submodule(name).weight, normalize, scale) for name in names}
    geometry = {name: str(model.get_submodule(name)) for name in names}
    biases = {name: model.get_submodule(name).bias for name in names}
    to_latent(model, BinarizationConfig(include=["*"], normalize=normalize, scale=scale))
    through_bits = copy.deepcopy(model)
    to_packed(through_bits)
    to_float(through_bits)
    to_float(model)
    for name, weight in expected.items():
        for converted in (model, through_bits):
            layer = converted.get_submodule(name)
            assert type(layer) is (nn.Conv2d if weight.dim() == 4 else nn.Linear)
            assert str(layer) == geometry[name]
            torch.testing.assert_close(layer.weight.detach(), weight, rtol=1e-6, atol=0)
        assert model.get_submodule(name).bias is biases[name]
        assert torch.equal(through_bits.get_submodule(name).bias, biases[name])


@pytest.mark.parametrize("soft", ["training", "soft evaluation"])
def test_float_layers_are_hard_whatever_the_mode(model, soft):
    expected = hard_weight(model.get_submodule(FIRST).weight, "row", "ls")
    to_latent(model, BinarizationConfig())
    set_mu(model, 0.5)
    model.train(soft == "training")
    with soft_evaluation(model):
        to_float(model)
    torch.testing.assert_close(model.get_submodule(FIRST).weight.detach(), expected, rtol=1e-6, atol=0)


def test_packed_layers_by_name(model):
    to_latent(model, EVERYTHING)
    assert packed_layers(model) == []
    to_packed(model)
    found = dict(packed_layers(model))
    assert len(found) == 14
    assert isinstance(found.pop(PATCHES), PackedConv2d)
    assert all(isinstance(layer, PackedLinear) for layer in found.values())
    assert all(found[name] is model.get_submodule(name) for name in found)


def test_packed_models_have_no_latents_left(model):
    to_latent(model, EVERYTHING)
    to_packed(model)
    floats = {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
    assert floats == {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"}


@pytest.mark.parametrize("state", ["latent", "packed"])
def test_a_second_time_is_refused(model, state):
    to_latent(model, BinarizationConfig())
    if state == "packed":
        to_packed(model)
    before = snapshot(model)
    with pytest.raises(ModelStateError, match=rf"This model is {state} already.*proxbit\.dequantize"):
        to_latent(model, BinarizationConfig(include=["classifier"]))
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("value", "stage"), [(float("nan"), "binarize"), (-float("inf"), "pack"), (0.0, "binarize"), (0.0, "pack")]
)
def test_an_error_changes_nothing(model, value, stage):
    """The bad weight is in the last layer: all others could have been replaced already."""
    if stage == "pack":
        to_latent(model, BinarizationConfig())
    spoil(model, LAST, value)
    before = snapshot(model)
    wrong = "are all zero" if value == 0 else "hold NaN or infinite values"
    with pytest.raises(LatentError, match=rf"{LAST}\.weight: 1 of 36 rows {wrong} \(first: row 2\)"):
        to_latent(model, BinarizationConfig()) if stage == "binarize" else to_packed(model)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("config", "levels"),
    [
        (BinarizationConfig(weights="pc", pair_parameters={"levels": [-1, 0, 1]}, include=["*"]), "-1, 0, 1"),
        (BinarizationConfig(weights="fp", include=["*"]), "no levels at all"),
    ],
    ids=["ternary", "fp"],
)
def test_levels_that_one_bit_cannot_store(model, config, levels):
    """Refused before anything changes; a float model of the hard weights is what remains."""
    to_latent(model, config)
    before = snapshot(model)
    with pytest.raises(ConfigError, match=rf"{PATCHES}: .* this pair has {levels}\. .*proxbit\.dequantize"):
        to_packed(model)
    assert snapshot(model) == before
    latent = model.get_submodule(FIRST).weight.detach().clone()
    to_float(model)
    weight = model.get_submodule(FIRST).weight.detach()
    if levels == "no levels at all":
        torch.testing.assert_close(weight, latent, rtol=1e-5, atol=0)
    else:
        assert {len(set(row.tolist())) for row in weight} == {3}
        assert torch.equal(weight != 0, 2 * latent.abs() > latent.abs().mean(dim=1, keepdim=True))


def test_layers_get_the_pair_and_the_units_of_the_configuration(model):
    config = BinarizationConfig(weights="adabin", include=[FIRST, PATCHES])
    to_latent(model, config)
    for name in config.include:
        layer = model.get_submodule(name)
        assert layer.pair is config.quantizer_pair()
        assert (layer.normalize, layer.scale, layer.center) == ("std", "fixed", "restore")
    to_packed(model)
    assert all(layer.weight_offset.shape == (36,) for _, layer in packed_layers(model))


def test_a_zero_row_says_how_to_leave_the_layer_out(model):
    spoil(model, LAST, 0.0)
    with pytest.raises(LatentError, match="all zero") as caught:
        to_latent(model, BinarizationConfig())
    assert f"modules_to_not_convert=['{LAST}']" in str(caught.value)


def test_a_bad_selection_changes_nothing(model):
    before = snapshot(model)
    with pytest.raises(PatternError, match="matches no module"):
        to_latent(model, BinarizationConfig(include=["vit.layers.0", "vit.layers.9"]))
    assert snapshot(model) == before


def test_bad_weights_of_layers_left_alone_are_none_of_our_business(model):
    spoil(model, LAST, float("nan"))
    report, _ = to_latent(model, BinarizationConfig(modules_to_not_convert=[LAST]))
    assert len(report.converted) == 11
    to_packed(model)


def test_check_latents(model):
    to_latent(model, EVERYTHING)
    check_latents(model)
    spoil(model, PATCHES, 0.0)
    with pytest.raises(LatentError, match=rf"{PATCHES}\.weight: 1 of 36 rows are all zero \(first: row 2\)"):
        check_latents(model)


def test_check_packed_layers(model):
    to_latent(model, EVERYTHING)
    to_packed(model)
    check_packed_layers(model)
    model.get_submodule(LAST).weight[3, -1] |= 1 << 7
    with pytest.raises(PackedFormatError, match=f"{LAST}: the 6 padding bits .* must be 0, row 3 has others"):
        check_packed_layers(model)


@pytest.mark.parametrize("convert", [to_packed, to_float], ids=["pack", "dequantize"])
def test_a_float_model_is_refused(model, convert):
    before = snapshot(model)
    with pytest.raises(ModelStateError, match="float"):
        convert(model)
    assert snapshot(model) == before


def test_the_meta_device_is_enough(model):
    """Without data: same keys and shapes as with data."""
    to_latent(model, EVERYTHING)
    to_packed(model)
    with torch.device("meta"):
        skeleton = hf.ViTForImageClassification(vit())
    to_latent(skeleton, EVERYTHING)
    to_packed(skeleton)
    expected = {name: (tensor.dtype, tensor.shape) for name, tensor in model.state_dict().items()}
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in skeleton.state_dict().items()} == expected
    assert all(tensor.is_meta for tensor in skeleton.state_dict().values())


@pytest.mark.parametrize(
    ("passes", "told"),
    [
        ("", False),
        ("soft", True),
        ("hard soft", True),
        ("soft hard", False),
        ("sharp", False),
        ("evaluated", False),
        ("ungraded", False),
    ],
)
def test_packing_tells_of_a_training_that_did_not_end_hard(caplog, passes, told):
    """Not of a model that was not trained here: of its weights nothing is known."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    to_latent(model, BinarizationConfig(weights="bnn++", include=["*"]))
    for kind in passes.split():
        set_mu(model, 300.0 if kind == "sharp" else 0.3, hard=kind == "hard")
        with torch.set_grad_enabled(kind != "ungraded"):
            model.train(kind != "evaluated")(torch.randn(2, 6))
    with caplog.at_level("WARNING", logger="proxbit"):
        to_packed(model)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == told and all("2 layers were trained with soft weights, which differ" in each for each in said)
