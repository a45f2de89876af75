"""Where quantizers start: parameters that fit the data, a function that stays near, and what is refused."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import proxbit
from proxbit.config import BinarizationConfig
from proxbit.errors import ConfigError, ModelStateError
from proxbit.nn import BinaryLinear, learned_modules
from proxbit.training import ProxConnectArguments, ProxConnectTrainer
from tiny_models import FAMILIES, LABELS, SIDE


def latent(activations, **options):
    return proxbit.binarize(FAMILIES["vit"](), proxbit.BinarizationConfig(activations=activations, **options))


def start(model, data, **options):
    return proxbit.calibrate(model, data, weights=False, **options)


def examples(crops, count=12):
    return [{"pixel_values": pixels, "labels": i % LABELS} for i, pixels in enumerate(crops(count, SIDE))]


def parameters(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".activation." in n or n.endswith("bias")}


class FeedForward(nn.Module):
    """A linear layer, a ReLU, a linear layer."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(40, 30), "fc2": nn.Linear(30, 40)})

    def forward(self, x):
        return self.mlp.fc2(torch.relu(self.mlp.fc1(x)))


@pytest.mark.parametrize("activations", ["sign", "int4"])
def test_it_lowers_the_error_of_a_model(activations):
    """Against the start that suits variance 1, on inputs of another size with means of their own."""
    torch.manual_seed(0)
    model = FeedForward()
    x = torch.randn(200, 40) * 3 + torch.randn(40) * 2
    expected = model(x)
    proxbit.binarize(model, proxbit.BinarizationConfig(weights="fp", activations=activations, include=["*"]))
    errors = []
    for _ in range(2):
        with torch.no_grad(), proxbit.soft_evaluation(model.eval()):
            errors.append(float((model(x) - expected).square().mean()))
        start(model, [{"x": x}])
    assert errors[1] < 0.7 * errors[0]


def test_scales_and_thresholds():
    layer = BinaryLinear(3, 2, pair=proxbit.quantizers.get_pair("bnn"), activations="sign")
    x = torch.tensor([[1.0, 2.0, 3.0], [3.0, 6.0, -3.0]])
    layer.activation.calibrate(x)
    assert layer.activation.shift.tolist() == layer.activation.threshold.tolist() == [2.0, 4.0, 0.0]
    assert float(layer.activation.scale) == pytest.approx(2.0)
    layer.activation.calibrate(x, may_shift=False)
    assert layer.activation.threshold.tolist() == [0, 0, 0]
    elastic = BinaryLinear(2, 2, pair=layer.pair, activations="elastic").activation
    elastic.calibrate(torch.tensor([[0.0, 2.0], [-0.1, 4.0], [0.1, 3.0]]))
    assert float(elastic.scale) == pytest.approx(3.0)


@pytest.mark.parametrize("form", ["batches", "loader", "dataset"])
def test_batches_or_a_dataset(form, crops):
    data = examples(crops)
    loader = DataLoader(data, batch_size=4)
    given = {"batches": list(loader), "loader": loader, "dataset": torch.utils.data.Subset(data, range(12))}[form]
    model = latent("sign")
    before = parameters(model)
    mode = model.training
    start(model, given)
    after = parameters(model)
    assert all(not torch.equal(after[name], before[name]) for name in before if ".activation.scale" in name)
    assert model.training == mode and type(model.vit.layers[0].mlp.fc1.activation).__name__ == "SignActivation"
    torch.manual_seed(0)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"pixel_values": x}], ids=["tensor", "dict"])
def test_a_batch_is_as_good_as_a_list_of_one(wrap, crops):
    batch, found = wrap(crops(6, SIDE)), []
    for data in (batch, [batch]):
        torch.manual_seed(0)
        found.append(parameters(start(latent("sign"), data)))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_failed_calibration_changes_nothing(dtype, crops):
    """To the last bit, whatever the biases gave to the thresholds."""
    model = start(latent("sign"), [crops(6, SIDE)]).to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match="NaN or infinite"):
        start(model, [torch.full((1, 3, SIDE, SIDE), torch.nan, dtype=dtype)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("pack", [False, True], ids=["latent", "packed"])
def test_dequantized_layers_get_back_what_thresholds_took_off(pack):
    """Means are no part of a sign, but of a float: only then is the float layer nearer than its sum of signs."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(64, 64))
    x = torch.randn(500, 64) + 2
    expected = layer(x)
    proxbit.binarize(layer, BinarizationConfig(activations="sign", include=["*"]))
    start(layer, {"input": x})
    if pack:
        proxbit.pack(layer)
    signs = float((layer.eval()(x) - expected).square().mean())
    with pytest.warns(UserWarning, match="without sign activations"):
        plain = proxbit.dequantize(layer)
    assert float((plain(x) - expected).square().mean()) < signs


def test_what_learns_nothing_is_left_alone(crops):
    model = latent("int8")
    before = parameters(model)
    start(model, [])
    assert all(torch.equal(value, before[name]) for name, value in parameters(model).items())


def test_what_is_refused(crops):
    with pytest.raises(ModelStateError, match="calibrate takes a latent model, this one is float"):
        start(FAMILIES["vit"](), [])
    model = latent("sign")
    for wrong in (0, 2.5, True):
        with pytest.raises(ConfigError, match=f"^num_images must be a whole number, at least 1, or None; not {wrong}"):
            start(model, [], num_images=wrong)
    with pytest.raises(ConfigError, match="the data is empty"):
        start(model, [])
    with pytest.raises(ConfigError, match=r"vit.layers.0.*NaN or infinite activations"):
        start(model, [torch.full((1, 3, SIDE, SIDE), torch.nan)])
    assert type(model.vit.layers[0].mlp.fc1.activation).__name__ == "SignActivation"


def trainer(model, crops, tmp_path, **arguments):
    arguments = ProxConnectArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to="none", save_strategy="no", **arguments
    )
    return ProxConnectTrainer(model=model, args=arguments, train_dataset=examples(crops))


def test_the_trainer_calibrates_what_nobody_has(crops, tmp_path):
    model = latent("sign")
    before = parameters(model)
    run = trainer(model, crops, tmp_path, learning_rate=1e-12)
    run.train()
    after = parameters(model)
    moved = [name for name in before if not torch.allclose(after[name], before[name], atol=1e-6)]
    assert {name.rpartition(".")[2] for name in moved} == {"bias", "scale", "threshold"}
    start(model, DataLoader(examples(crops), batch_size=2), num_images=2)
    mine = parameters(model)
    trainer(model, crops, tmp_path, learning_rate=1e-12).train()
    assert all(torch.allclose(value, mine[name], atol=1e-6) for name, value in parameters(model).items())


def test_the_trainer_calibrates_under_its_autocast(crops, tmp_path):
    """BEiT does not cast the pixels itself: weights in bf16 take them as the context of the training does."""
    model = proxbit.binarize(FAMILIES["beit"]().bfloat16(), BinarizationConfig(activations="sign"))
    trainer(model, crops, tmp_path, bf16=True, use_cpu=True).train()
    assert all(module.calibrated for _, module in learned_modules(model))


def test_what_is_learned_does_not_decay(crops, tmp_path):
    run = trainer(latent("sign", rprelu=True), crops, tmp_path, weight_decay=0.1)
    names = run.get_decay_parameter_names(run.model)
    assert names and not any(".activation." in name or ".rprelu." in name for name in names)


def test_pairs_of_activations_have_their_own_mu(crops, tmp_path):
    model = latent("sign", activation_pair="bnn++", weights="bc")
    run = trainer(model, crops, tmp_path)
    seen = []
    layer = model.vit.layers[0].mlp.fc1
    layer.register_forward_pre_hook(lambda *_: seen.append((float(layer.activation.mu), layer.is_hard)))
    run.args.max_steps = 10
    run.args.hard_fraction = 0.2
    run.train()
    schedule = layer.activation.pair.schedule
    trained = seen[-10:]
    assert trained[0] == (pytest.approx(schedule[1]), False)
    assert trained[-1] == (pytest.approx(schedule[2]), True)


def test_calibrating_twice_is_calibrating_once(crops):
    """What the first time took off the inputs, and gave to the biases, is taken back before the second."""
    batches = list(DataLoader(examples(crops), batch_size=6))
    once = start(latent("sign"), batches)
    first = parameters(once)
    second = parameters(start(once, batches))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-5, msg=name)


def binary_attention(**changes):
    model = FAMILIES["vit"]()
    model.set_attn_implementation("proxbit_binary")
    for layer in model.vit.layers:
        torch.nn.init.normal_(layer.attention.q_proj.weight, std=0.5)
        torch.nn.init.normal_(layer.attention.k_proj.weight, std=0.5)
    return proxbit.binarize(model, proxbit.BinarizationConfig(**changes))


def scales(model):
    return [layer.attention.binary_probabilities.scale.detach().clone() for layer in model.vit.layers]


def test_scales_of_probabilities_are_those_of_the_data(crops, tmp_path):
    """The second attention sees the first one with probabilities as they are. The Trainer does it, and trains them."""
    batches = list(DataLoader(examples(crops), batch_size=4))
    model, seen = binary_attention(), []
    fresh = copy.deepcopy(model)
    start(model, batches)
    first, second = model.vit.layers
    first.attention.binary_probabilities.register_forward_hook(lambda module, given, _: (given[0], torch.ones(())))
    second.attention.binary_probabilities.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.no_grad(), proxbit.soft_evaluation(model.eval()):
        for batch in batches:
            model(batch["pixel_values"])
    units = torch.cat(seen).flatten() * seen[0].shape[-1]
    tried = torch.linspace(0.5, 12, 4000)
    errors = [float((units - s * (units >= s / 2)).square().sum()) for s in tried]
    assert float(scales(model)[1]) == pytest.approx(float(tried[errors.index(min(errors))]), abs=0.02)
    assert scales(model)[0] != scales(model)[1]

    run = trainer(fresh, crops, tmp_path, weight_decay=0.1, learning_rate=1e-2)
    assert not any("binary_probabilities" in name for name in run.get_decay_parameter_names(run.model))
    run.train()
    assert all(module.calibrated for _, module in proxbit.nn.learned_modules(run.model))
    moved = [float((after - before).abs()) for after, before in zip(scales(run.model), scales(model), strict=True)]
    assert all(1e-3 < way < 0.05 for way in moved)
