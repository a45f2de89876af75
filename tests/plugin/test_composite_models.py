"""Parts and wholes keep how they were binarized: loaded again they give the same answers, bit for bit, or an error."""

import copy
import json
import warnings

import pytest
import torch
import transformers as hf
from torch import nn

import proxbit
from proxbit.errors import CheckpointError, ModelStateError
from proxbit.nn import BinaryLinear
from proxbit.patching import state_of
from tiny_models import FAMILIES, vit
from wholes import VISION, WHOLES, Framed, answer_of_part

STATES = {
    "latent": proxbit.binarize,
    "packed": lambda model: proxbit.pack(proxbit.binarize(model)),
    "float": lambda model: proxbit.dequantize(proxbit.pack(proxbit.binarize(model))),
}


@pytest.fixture
def pictures(crops):
    return crops(2, 32)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def stored(folder):
    return json.loads((folder / "config.json").read_text())


def rewrite(folder, change):
    """Change the configuration in a folder."""
    config = stored(folder)
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def check_folder(folder, model, ask, state):
    """That a folder holds this model."""
    again = type(model).from_pretrained(folder).eval()
    assert state_of(again) == state
    assert torch.equal(ask(again), ask(model))
    tensors = again.state_dict()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in model.state_dict().items())
    return again


# Each model in each state, and binarized in each of the ways.
WAYS = ["whole", "part", "part before"]
CASES = [(name, list(STATES)[(i + j) % 3], WAYS[j]) for i, name in enumerate(WHOLES) for j in range(3)]


@pytest.mark.parametrize(("name", "state", "of"), CASES)
def test_what_is_saved_is_loaded(tmp_path, pictures, name, state, of):
    """Binarized as a whole, a part in it, or a part that was given to it; saved and loaded, and saved again."""
    whole = WHOLES[name]
    model = whole.make().eval()
    if of == "part before":
        part = STATES[state](copy.deepcopy(model.get_submodule(whole.part)))
        model.set_submodule(whole.part, part)
        model.post_init()
    else:
        STATES[state](model if of == "whole" else model.get_submodule(whole.part))
    ask = lambda model: whole.ask(model, pictures)  # noqa: E731
    model.save_pretrained(tmp_path / "whole")
    again = check_folder(tmp_path / "whole", model, ask, state)
    again.save_pretrained(tmp_path / "again")
    check_folder(tmp_path / "again", model, ask, state)
    part, ask_part = model.get_submodule(whole.part), lambda model: answer_of_part(model, pictures)
    for each in (part, again.get_submodule(whole.part), copy.deepcopy(part)):
        each.save_pretrained(tmp_path / "part")
        check_folder(tmp_path / "part", part, ask_part, state)
    if whole.from_whole:
        for options in ({}, {"ignore_mismatched_sizes": True}):
            tower = type(part).from_pretrained(tmp_path / "whole", **options).eval()
            assert state_of(tower) == state
            assert torch.equal(ask_part(tower), ask_part(part))


@pytest.mark.parametrize(
    ("kind", "state"),
    [("CLIPVisionModel", "packed"), ("CLIPVisionModelWithProjection", "latent"), ("CLIPTextModel", "packed")],
)
def test_towers_of_files_in_which_the_whole_alone_says_it(tmp_path, pictures, state, kind):
    """As proxbit wrote them before parts said it too."""
    model = STATES[state](WHOLES["CLIP"].make()).eval()
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda config: config["vision_config"].pop("quantization_config"))
    tower = getattr(hf, kind).from_pretrained(tmp_path).eval()
    if kind == "CLIPTextModel":
        assert state_of(tower) == "float" and not hasattr(tower.config, "quantization_config")
        return
    inside = getattr(tower, "vision_model", tower)
    assert state_of(tower) == state
    assert torch.equal(answer_of_part(inside, pictures), answer_of_part(model.vision_model, pictures))


def test_a_whole_that_cannot_be_followed_is_refused(tmp_path):
    proxbit.binarize(WHOLES["CLIP"].make()).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda config: config["vision_config"].pop("quantization_config"))
    for architecture in ("Unheard", "AutoModel", "CLIPConfig"):
        rewrite(tmp_path, lambda config, name=architecture: config.update(architectures=[name]))
        with pytest.raises(CheckpointError, match="of a composite model, clip, .* cannot be followed here"):
            hf.CLIPVisionModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("state", ["latent", "packed"])
def test_wholes_of_files_in_which_the_part_alone_says_it(tmp_path, pictures, state):
    whole = WHOLES["encoder and decoder"]
    model = whole.make().eval()
    STATES[state](model.encoder)
    model.save_pretrained(tmp_path)
    said = stored(tmp_path)["quantization_config"]
    rewrite(tmp_path, lambda config: config.pop("quantization_config"))
    again = check_folder(tmp_path, model, lambda model: whole.ask(model, pictures), state)
    assert again.config.quantization_config.to_dict() == said


def test_parts_in_two_states_are_refused_when_loaded_and_when_saved(tmp_path):
    model = hf.VisionTextDualEncoderModel(
        vision_model=hf.CLIPVisionModel(hf.CLIPVisionConfig(**VISION)), text_model=hf.ViTModel(hf.ViTConfig(**VISION))
    )
    proxbit.binarize(model.text_model), proxbit.pack(proxbit.binarize(model.vision_model))
    with pytest.raises(ModelStateError, match="some packed"):
        model.save_pretrained(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    proxbit.pack(model.text_model)
    model.save_pretrained(tmp_path / "packed")
    rewrite(tmp_path / "packed", lambda config: config.pop("quantization_config"))
    rewrite(tmp_path / "packed", lambda config: config["text_config"]["quantization_config"].update(state="latent"))
    with pytest.raises(CheckpointError, match="some parts of the model are latent and some packed"):
        hf.VisionTextDualEncoderModel.from_pretrained(tmp_path / "packed")


@pytest.mark.filterwarnings("ignore:.* is float, though its configuration")
@pytest.mark.parametrize("change", ["a float tower", "a float layer", "back to float", "another way"])
def test_what_is_done_to_a_part_is_known_when_the_whole_is_saved(tmp_path, pictures, change):
    whole = WHOLES["CLIP"]
    model = proxbit.binarize(whole.make()).eval()
    if change == "a float tower":
        model.vision_model = whole.make().vision_model
    elif change == "a float layer":
        model.vision_model.encoder.layers[0].mlp.fc1 = nn.Linear(40, 56)
    else:
        proxbit.dequantize(model.vision_model)
    if change == "another way":
        proxbit.binarize(model.vision_model, proxbit.BinarizationConfig(weights="bc", activations="int8"))
    model.eval().save_pretrained(tmp_path)
    state = "latent" if change in ("a float layer", "another way") else "float"
    check_folder(tmp_path, model, lambda model: whole.ask(model, pictures), state)
    assert ("quantization_config" in stored(tmp_path)) == (state == "latent")


def test_layers_of_no_origin_are_refused_unless_their_class_makes_them(tmp_path):
    class Own(Framed):
        def __init__(self, config):
            super().__init__(config)
            self.score = BinaryLinear(config.hidden_size, 3, pair=proxbit.quantizers.get_pair("bc"))

    model = Own(hf.ViTConfig(**VISION)).eval()
    model.save_pretrained(tmp_path / "own")
    assert torch.equal(Own.from_pretrained(tmp_path / "own").score.weight, model.score.weight)
    layer = model.inside.layers[1].mlp
    layer.fc1 = BinaryLinear.from_float(layer.fc1, proxbit.quantizers.get_pair("bc"), proxbit.quantizers.RowUnits())
    with pytest.raises(ModelStateError, match=r"inside\.layers\.1\.mlp\.fc1 .* proxbit\.binarize"):
        model.save_pretrained(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_a_float_model_of_a_configuration_that_says_packed_is_saved_as_what_it_is(tmp_path, pictures):
    """Made from that alone, by itself and within a whole; the configuration that was given stays as it was."""
    packed = proxbit.pack(proxbit.binarize(FAMILIES["vit"]()))
    config = packed.config
    model = hf.AutoModelForImageClassification.from_config(config).eval()
    assert state_of(model) == "float"
    with pytest.warns(UserWarning, match="ViTForImageClassification is float, though its configuration says"):
        model.save_pretrained(tmp_path / "float")
    check_folder(tmp_path / "float", model, lambda model: model(pictures).logits, "float")
    tower = proxbit.pack(proxbit.binarize(WHOLES["CLIP"].make())).vision_model
    text = hf.CLIPTextConfig(**VISION | dict(vocab_size=50))
    whole = hf.CLIPModel(hf.CLIPConfig(vision_config=tower.config, text_config=text, projection_dim=24))
    with pytest.warns(UserWarning, match="CLIPModel is float"):
        whole.save_pretrained(tmp_path / "whole")
    assert "quantization_config" not in json.dumps(stored(tmp_path / "whole"))
    assert packed.config.quantization_config.state == tower.config.quantization_config.state == "packed"


def test_models_made_from_one_configuration_are_saved_as_what_they_are(tmp_path, pictures):
    config = vit()
    first, second = (hf.ViTForImageClassification(config).eval() for _ in range(2))
    proxbit.binarize(first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        second.save_pretrained(tmp_path / "float")
    first.save_pretrained(tmp_path / "latent")
    check_folder(tmp_path / "float", second, lambda model: model(pictures)[0], "float")
    check_folder(tmp_path / "latent", first, lambda model: model(pictures)[0], "latent")


@pytest.mark.parametrize(
    ("given", "state"),
    [("its own", "latent"), ("of before it was packed", "packed"), ("that of a float model", "packed")],
)
def test_a_configuration_that_is_given_makes_what_the_folder_holds(tmp_path, pictures, state, given):
    model = STATES[state](hf.ViTForImageClassification(vit())).eval()
    model.save_pretrained(tmp_path)
    others = {"its own": model, "that of a float model": hf.ViTForImageClassification(vit())}
    other = others.get(given) or STATES["packed" if state == "latent" else "latent"](FAMILIES["vit"]())
    again = hf.ViTForImageClassification.from_pretrained(tmp_path, config=other.config).eval()
    assert state_of(again) == state
    assert torch.equal(again(pictures).logits, model(pictures).logits)


def test_tensors_that_are_given_are_written(tmp_path):
    """Such as averages of the weights. They are of the model's own state."""
    model = proxbit.binarize(hf.ViTForImageClassification(vit()))
    given = {name: 2 * tensor + 0.1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "mean", state_dict=given)
    again = hf.ViTForImageClassification.from_pretrained(tmp_path / "mean")
    assert all(torch.equal(tensor, given[name]) for name, tensor in again.state_dict().items())
    assert model.hf_quantizer.gathered_state is None
    packed = proxbit.pack(copy.deepcopy(model))
    bits = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    packed.save_pretrained(tmp_path / "bits", state_dict=bits)
    for each, wrong in ((packed, given), (model, bits)):
        with pytest.raises(ModelStateError, match="state_dict: vit.* not in the same state"):
            each.save_pretrained(tmp_path / "wrong", state_dict=wrong)
    assert not (tmp_path / "wrong").exists()
