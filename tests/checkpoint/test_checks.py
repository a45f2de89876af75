"""Damaged and foreign packed checkpoints: each is a clear error before a wrong model is in anybody's hands."""

import json

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import proxbit
from proxbit.checkpoint.checks import check_packed_files
from proxbit.errors import CheckpointError, PackedFormatError, ProxbitError
from proxbit.patching import packed_layers
from tiny_models import FAMILIES, LABELS, SIDE, vit

QUERY = "vit.encoder.layer.0.attention.attention.query.weight"
FC1 = "vit.encoder.layer.1.intermediate.dense.weight"
FC2 = "vit.encoder.layer.1.output.dense.weight"


@pytest.fixture
def folder(tmp_path):
    """A packed checkpoint. It has no padding bits: random bytes in a layer look like any others."""
    model = hf.ViTForImageClassification(vit(hidden_size=32, intermediate_size=48))
    proxbit.pack(proxbit.binarize(model)).save_pretrained(tmp_path)
    return tmp_path


def load(path, ignore_mismatched_sizes=False):
    return hf.AutoModelForImageClassification.from_pretrained(path, ignore_mismatched_sizes=ignore_mismatched_sizes)


def refused(path, error, message):
    """Loading is refused with the same error whether or not mismatched sizes are to be ignored."""
    for ignore in (False, True):
        with pytest.raises(error, match=message) as caught:
            load(path, ignore)
        assert isinstance(caught.value, ProxbitError)


def edit(path, change):
    """Change the tensors of the checkpoint: `change` gets the dictionary."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, metadata={"format": "pt"})


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] |= changes
    (path / "config.json").write_text(json.dumps(config))


def swap(*keys):
    def change(tensors):
        for suffix in ("", "_scale"):
            first, second = (key + suffix for key in keys)
            tensors[first], tensors[second] = tensors[second], tensors[first]

    return change


def rename(key, name):
    def change(tensors):
        for suffix in ("", "_scale"):
            tensors[name + suffix] = tensors.pop(key + suffix)

    return change


def put(key, make):
    """Replace a tensor by what `make` makes of it."""
    return lambda tensors: tensors.update({key: make(tensors[key])})


def test_an_undamaged_checkpoint_loads(folder):
    """The control of all tests below: neither `edit` nor `edit_config` is what makes a checkpoint unreadable."""
    edit(folder, lambda tensors: None)
    edit_config(folder)
    for ignore in (False, True):
        assert len(packed_layers(load(folder, ignore))) == 12


def refuse_each(folder, damages):
    """Each change of the tensors is refused, by itself, with its error and message."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    for change, error, message in damages:
        file.write_bytes(content)
        edit(folder, change)
        refused(folder, error, message)


def test_a_truncated_file(folder):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    for kept in (0.99, 0.5, 0.01, 0.0):
        file.write_bytes(content[: int(kept * len(content))])
        refused(folder, CheckpointError, r"model\.safetensors is truncated or damaged .*\. Download or copy it again")


def test_tensors_of_a_wrong_shape_or_dtype(folder):
    narrow = r"do not fit the model: expected \{\(3\d, \d\): 1\}.*found \{\(3\d, \d\): 1\}"
    short = rf"{QUERY}: expected packed bits, U8 \[32, \.\.\.\].*found U8 \[31, 4\]"
    damages = [
        (put(QUERY, lambda bits: bits[:, 1:]), narrow),
        (put(QUERY, lambda bits: bits[1:]), short),
        (put(QUERY, lambda bits: bits.flatten()), rf"{QUERY}: expected packed bits.*found U8 \[128\]"),
        (put(QUERY, lambda bits: bits.float()), rf"{QUERY}: expected packed bits.*found F32"),
        (put(QUERY, lambda bits: bits.to(torch.int8)), rf"{QUERY}: expected packed bits.*found I8"),
        (put(FC2 + "_scale", lambda scale: scale[1:]), rf"{FC2}: expected packed bits, U8 \[31, \.\.\.\]"),
        (put(FC2 + "_scale", lambda scale: scale[:, None]), rf"{FC2}: expected packed bits"),
    ]
    refuse_each(folder, [(change, CheckpointError, message) for change, message in damages])


def test_missing_tensors(folder):
    unfit = r"do not fit the model.* Layers concerned: vit\.layers\.0\.attention\.q_proj"
    cases = {(QUERY,): f"{QUERY}: expected packed bits, .* found missing", (QUERY + "_scale",): unfit}
    cases |= {(QUERY, QUERY + "_scale"): unfit}

    def without(keys):
        return lambda tensors: [tensors.pop(key) for key in keys]

    refuse_each(folder, [(without(keys), CheckpointError, message) for keys, message in cases.items()])


def test_tensors_under_another_name(folder):
    """Number and shapes of the tensors are right, and yet a layer gets none: its bits would be arbitrary."""
    others = ("body.weight", QUERY.replace("layer.0", "layer.2"))
    refuse_each(
        folder, [(rename(QUERY, name), CheckpointError, r"vit\.layers\.0\.attention\.q_proj") for name in others]
    )


def test_tensors_in_the_place_of_others(folder):
    edit(folder, swap(QUERY, FC1))
    with pytest.raises(CheckpointError, match=r"vit\.layers\.(0\.attention\.q_proj|1\.mlp\.fc1)"):
        load(folder, ignore_mismatched_sizes=True)
    with pytest.raises((CheckpointError, RuntimeError), match=r"q_proj|ignore_mismatched_sizes"):
        load(folder)


def test_scales_that_are_no_finite_floating_point_numbers(folder):
    def cast(dtype):
        return put(FC1 + "_scale", lambda scale: scale.to(dtype))

    def spoiled(value):
        return lambda tensors: tensors[FC1 + "_scale"].__setitem__(5, value)

    message = r"vit\.layers\.1\.mlp\.fc1: weight_scale must be finite, row 5 is"
    damages = [(cast(dtype), ProxbitError, "scale") for dtype in (torch.int32, torch.uint8, torch.bool)]
    for value in (float("nan"), float("inf"), -float("inf")):
        damages.append((spoiled(value), PackedFormatError, f"{message} {value}"))
    refuse_each(folder, damages)


def test_padding_bits_that_are_set(tmp_path):
    """36 columns are four bytes and four bits."""
    proxbit.pack(proxbit.binarize(hf.ViTForImageClassification(vit()))).save_pretrained(tmp_path)
    message = r"vit\.layers\.0\.attention\.q_proj: the 4 padding bits .* row 7 has others"

    def set_bit(bit):
        return lambda tensors: tensors[QUERY][7, 4].bitwise_or_(1 << bit)

    refuse_each(tmp_path, [(set_bit(bit), PackedFormatError, message) for bit in (4, 7)])


def test_a_bit_that_is_no_padding_is_data(tmp_path):
    """The control of the test above."""
    proxbit.pack(proxbit.binarize(hf.ViTForImageClassification(vit()))).save_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: tensors[QUERY][7, 4].bitwise_xor_(1 << 3))
    assert len(packed_layers(load(tmp_path))) == 12


def test_files_that_would_be_unpickled(folder):
    """Refused by their name, before they are opened."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    refused(
        folder, CheckpointError, r"pytorch_model\.bin: packed checkpoints are safetensors files; nothing is unpickled"
    )


def test_a_pickle_beside_the_safetensors_is_not_opened(folder):
    (folder / "pytorch_model.bin").write_bytes(b"no tensors in here")
    assert len(packed_layers(load(folder))) == 12


@pytest.mark.parametrize("extra", [{}, {"activations": "sign"}], ids=["known fields", "fields of the future"])
def test_a_newer_format(folder, extra):
    edit_config(folder, format_version=2, **extra)
    refused(folder, CheckpointError, "format_version 2; this proxbit reads up to 1.*pip install --upgrade proxbit")


def test_a_configuration_that_selects_more_than_the_file_has(folder):
    """The float weight of that layer in the file does not pass for packed bits."""
    edit_config(folder, include=["vit.layers", "classifier"])
    refused(folder, CheckpointError, r"do not fit the model: expected .* Layers concerned: classifier")


def test_a_configuration_that_selects_less_than_the_file_has(folder):
    """A float layer would be filled with random weights."""
    edit_config(folder, include=["vit.layers.1"])
    refused(folder, CheckpointError, r"do not fit the model: expected \{\}.*found \{")


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_one_of_several_files(folder, damage):
    model = load(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="5KB")
    file = sorted(folder.glob("model-*.safetensors"))[1]
    if damage == "missing":
        file.unlink()
        with pytest.raises((CheckpointError, OSError), match=file.name):
            load(folder)
    else:
        file.write_bytes(file.read_bytes()[:-1])
        refused(folder, CheckpointError, f"{file.name} is truncated or damaged")


def test_files_are_checked_from_their_headers(folder):
    """A function of files and layers: no tensor of the model is touched."""
    config = hf.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = proxbit.pack(proxbit.binarize(hf.ViTForImageClassification(config)))
    file = str(folder / "model.safetensors")
    check_packed_files([file], packed_layers(model))
    with pytest.raises(CheckpointError, match="do not fit the model"):
        check_packed_files([], packed_layers(model))
    with pytest.raises(CheckpointError, match="do not fit the model"):
        check_packed_files([file], packed_layers(model)[1:])


@pytest.fixture
def offsets(tmp_path):
    """A packed checkpoint whose rows have offsets, and its model."""
    model = hf.ViTForImageClassification(vit(initializer_range=0.3)).eval()
    proxbit.pack(proxbit.binarize(model, proxbit.BinarizationConfig(weights="adabin"))).save_pretrained(tmp_path)
    return tmp_path, model


def test_offsets_are_stored_and_loaded(offsets, crops):
    path, model = offsets
    tensors = load_file(path / "model.safetensors")
    keys = [key for key in tensors if key.endswith(".weight_scale")]
    assert len(keys) == 12
    for key in keys:
        offset = tensors[key.removesuffix("scale") + "offset"]
        assert (offset.shape, offset.dtype) == (tensors[key].shape, torch.float32)
        assert offset.abs().max() > 0
    with torch.no_grad():
        one, two = (each(pixel_values=crops(4, 32)).logits for each in (model, load(path)))
    assert torch.equal(one, two)


def test_a_missing_offset(offsets):
    edit(offsets[0], lambda tensors: tensors.pop(FC1 + "_offset"))
    refused(offsets[0], CheckpointError, r"vit\.layers\.1\.mlp\.fc1\.weight_offset is not in the checkpoint")


def test_an_offset_that_is_not_finite(offsets):
    edit(offsets[0], lambda tensors: tensors[FC1 + "_offset"].__setitem__(5, float("nan")))
    refused(offsets[0], PackedFormatError, r"vit\.layers\.1\.mlp\.fc1: weight_offset must be finite, row 5 is nan")


def test_offsets_that_the_configuration_does_not_know(offsets):
    """They would be left out without a word: a wrong model."""
    edit_config(offsets[0], center="none")
    refused(offsets[0], CheckpointError, "offset")


@pytest.fixture
def gated():
    """transformers writes the weights of gate_proj and up_proj as one, weights_in."""
    sizes = dict(image_size=SIDE, patch_size=8, hidden_size=36, num_hidden_layers=2, num_attention_heads=4)
    config = hf.Dinov2Config(**sizes, num_labels=LABELS, use_swiglu_ffn=True)
    return proxbit.pack(proxbit.binarize(hf.Dinov2ForImageClassification(config))).eval()


def test_weights_that_are_written_as_one(tmp_path, gated, crops):
    gated.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    joined = [name for name in tensors if name.endswith("weights_in.weight")]
    assert len(joined) == 2 and not any(f"{name}_scale" in tensors for name in joined)
    with torch.no_grad():
        assert torch.equal(load(tmp_path).eval()(crops(2, SIDE)).logits, gated(crops(2, SIDE)).logits)


def test_weights_that_are_written_as_one_and_do_not_fit(tmp_path, gated):
    """A row less, a byte less, none, a scale less, scales of its own."""
    gated.save_pretrained(tmp_path)
    name = "dinov2.encoder.layer.1.mlp.weights_in.weight"
    changes = [
        lambda tensors: tensors.update({name: tensors[name][:-1]}),
        lambda tensors: tensors.update({name: tensors[name][:, :-1]}),
        lambda tensors: tensors.pop(name),
        lambda tensors: tensors.pop(name.replace("weights_in.weight", "up_proj.weight_scale")),
        lambda tensors: tensors.update({f"{name}_scale": torch.ones(len(tensors[name]))}),
    ]
    refuse_each(tmp_path, [(change, CheckpointError, "packed") for change in changes])


def test_buffers_are_checked_like_parameters(tmp_path):
    """Such as the statistics of a batch normalization."""
    model = proxbit.pack(proxbit.binarize(FAMILIES["resnet"]()))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for key, dtype in {"running_mean": torch.int32, "running_var": torch.uint8}.items():
        name = next(name for name in tensors if name.endswith(key))
        save_file(tensors | {name: tensors[name].to(dtype)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(
            CheckpointError, match=rf"{key} is {dtype} in the checkpoint; it must be one of torch.float32"
        ):
            type(model).from_pretrained(tmp_path)
