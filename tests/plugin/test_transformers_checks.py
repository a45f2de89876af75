"""What the suite of transformers asks of each of its models, asked of latent and packed ones."""

import copy
from inspect import signature

import pytest
import torch
import transformers as hf
from torch import nn

import proxbit
from families import TABLE
from proxbit.errors import CheckpointError
from proxbit.nn import latent_layers
from proxbit.patching import packed_layers, state_of
from tiny_models import FAMILIES, vit
from wholes import WHOLES

STATES = {"latent": proxbit.binarize, "packed": lambda model: proxbit.pack(proxbit.binarize(model))}
# Each state with token and pyramid models, and packed convolutions.
CASES = [
    ("vit", "packed"),
    ("swin", "latent"),
    ("clip with text", "packed"),
    ("segformer", "latent"),
    ("resnet", "packed"),
]


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def saved(request, tmp_path_factory):
    """A model, its folder, its family and state."""
    name, state = request.param
    torch.manual_seed(0)
    model, folder = STATES[state](FAMILIES[name]()).eval(), tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return model, folder, name, state


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def is_same(model, other):
    """Whether two models have the same tensors, of the same types."""
    tensors, others = model.state_dict(), other.state_dict()
    return tensors.keys() == others.keys() and all(
        torch.equal(tensor, others[name]) and tensor.dtype == others[name].dtype for name, tensor in tensors.items()
    )


def test_save_and_load(saved, crops):
    """With the options that change how, and not what."""
    model, folder, name, state = saved
    inputs = TABLE[name].inputs(crops(2, TABLE[name].side))
    for options in ({}, {"low_cpu_mem_usage": True}, {"device_map": "cpu"}, {"dtype": torch.float32}):
        loaded, found = type(model).from_pretrained(folder, output_loading_info=True, **options)
        assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert state_of(loaded) == state and is_same(loaded, model)
    for answer, wanted in zip(loaded(**inputs).to_tuple(), model(**inputs).to_tuple(), strict=True):
        assert not isinstance(answer, torch.Tensor) or torch.equal(answer, wanted)


def test_what_is_initialized_stays(saved):
    """When it is put into another model, which fills at random what is not marked."""
    model, folder, *_ = saved
    kinds = [lambda: type(model).from_pretrained(folder), lambda: copy.deepcopy(model)]
    for make in (*kinds, lambda: proxbit.dequantize(copy.deepcopy(model))):
        inside = make()
        before = copy.deepcopy(inside)

        class Around(hf.PreTrainedModel):
            config_class = type(model.config)
            _supports_sdpa = True

            def __init__(self, config, inside):
                super().__init__(config)
                self.inside = inside
                self.post_init()

            _init_weights = type(model)._init_weights

        Around(copy.deepcopy(model.config), inside)
        assert is_same(inside, before)


def test_what_was_not_loaded_is_marked_too():
    """Made in memory, copied before or after, and again from bits."""
    for make in (lambda: FAMILIES["vit"](), lambda: copy.deepcopy(FAMILIES["vit"]()), lambda: nn.Linear(8, 8)):
        for convert in (*STATES.values(), lambda model: proxbit.dequantize(proxbit.binarize(model))):
            model = make()
            model = convert(model if isinstance(model, hf.PreTrainedModel) else nn.ModuleList([model]))
            before = copy.deepcopy(model)
            around = FAMILIES["vit"]()
            around.inside = model
            around.post_init()
            assert is_same(model, before)


def test_base_models(saved):
    """The backbone, of the folder of the model of a task."""
    model, folder, _, state = saved
    base = model.base_model
    if base is model or not hasattr(type(base), "from_pretrained"):
        return
    options = {"add_pooling_layer": False} if "add_pooling_layer" in signature(type(base).__init__).parameters else {}
    loaded = type(base).from_pretrained(folder, **options)
    base.save_pretrained(folder / "base")
    for each in (loaded, type(base).from_pretrained(folder / "base", **options)):
        assert state_of(each) == state and is_same(each, base)


def test_dtypes(saved):
    model, folder, *_ = saved
    kind = type("Kept", (type(model),), {"_keep_in_fp32_modules_strict": ["norm", "embeddings"]})
    loaded, plain = (each.from_pretrained(folder, dtype=torch.bfloat16) for each in (kind, type(model)))
    for (name, tensor), other in zip(loaded.state_dict().items(), plain.state_dict().values(), strict=True):
        kept = other.is_floating_point() and ("norm" in name or "embeddings" in name)
        assert tensor.dtype == (torch.float32 if kept else other.dtype), name


def test_a_new_head(saved):
    """As float models: what has another size is new, and what is binarized is what it was."""
    model, folder, name, state = saved
    if not hasattr(model, "classifier"):
        return
    loaded = type(model).from_pretrained(folder, num_labels=7, ignore_mismatched_sizes=True)
    layers = {"latent": lambda model: list(latent_layers(model)), "packed": packed_layers}[state]
    assert loaded.config.num_labels == 7
    assert all(is_same(a, b) for (_, a), (_, b) in zip(layers(loaded), layers(model), strict=True))


@pytest.mark.parametrize("state", STATES)
def test_tied_weights_and_new_tokens(tmp_path, crops, state):
    """A decoder behind a binarized encoder keeps its tie, and its vocabulary grows."""
    whole = WHOLES["encoder and decoder"]
    model = whole.make().eval()
    STATES[state](model.encoder)
    decoder = model.decoder
    decoder.resize_token_embeddings(57)
    for each in (model, copy.deepcopy(model)):
        each.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert loaded.decoder.lm_head.weight is loaded.decoder.transformer.wte.weight
        assert loaded.decoder.lm_head.weight.shape[0] == 57
        assert is_same(loaded, model)
        assert torch.equal(whole.ask(loaded, crops(2, 32)), whole.ask(model, crops(2, 32)))


@pytest.mark.parametrize("state", STATES)
def test_more_than_the_file_has(tmp_path, state):
    """A keyword may ask for it, of floats; a file that lacks what its class has is damaged."""
    model = STATES[state](hf.ViTModel(vit()))
    model.save_pretrained(tmp_path)
    loaded = hf.ViTModel.from_pretrained(tmp_path, use_mask_token=True)
    assert loaded.embeddings.mask_token is not None
    del loaded.embeddings.mask_token
    assert is_same(loaded, model)
    with pytest.raises(CheckpointError, match=r"layers\.2\.|do not fit the model"):
        hf.ViTModel.from_pretrained(tmp_path, num_hidden_layers=3)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "layernorm.weight"}
    model.save_pretrained(tmp_path / "cut", state_dict=tensors)
    for options in ({}, {"use_mask_token": True}):
        with pytest.raises(CheckpointError, match=r"layernorm\.weight"):
            hf.ViTModel.from_pretrained(tmp_path / "cut", **options)


@pytest.mark.parametrize("state", STATES)
def test_tensors_in_hand(state):
    """`from_pretrained` of a configuration and tensors, without a folder."""
    model = STATES[state](FAMILIES["vit"]())
    loaded = type(model).from_pretrained(None, config=model.config, state_dict=copy.deepcopy(model.state_dict()))
    assert state_of(loaded) == state and is_same(loaded, model)
