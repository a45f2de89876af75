"""What is checked of a folder before transformers opens a weight in it."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, ViTForImageClassification

import proxbit
from proxbit.checkpoint.checks import check_folder, check_sizes
from proxbit.checkpoint.files import folder_files
from proxbit.errors import CheckpointError, ProxbitError
from tiny_models import FAMILIES, vit


def names(folder, **arguments):
    return [file.name for file in folder_files(folder, **arguments)]


def test_one_file_or_those_of_the_index(plain, shards):
    assert names(plain) == ["model.safetensors"]
    assert names(shards) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert names(shards, name="model.safetensors.index.json") == names(shards)


def test_a_variant(plain):
    (plain / "model.safetensors").rename(plain / "model.half.safetensors")
    assert names(plain, variant="half") == ["model.half.safetensors"]
    with pytest.raises(CheckpointError, match=r"has no file model\.safetensors or model\.safetensors\.index\.json\.$"):
        names(plain)


def test_shards_of_a_variant(tmp_path):
    """As transformers names them."""
    model = proxbit.pack(proxbit.binarize(FAMILIES["vit"]()))
    model.save_pretrained(tmp_path, max_shard_size="5kB", variant="half")
    assert len(names(tmp_path, variant="half")) > 1 and (tmp_path / "model.safetensors.index.half.json").exists()
    assert proxbit.summary(type(model).from_pretrained(tmp_path, variant="half")).state == "packed"


def test_both_are_as_in_transformers(plain, shards):
    """The whole file wins."""
    (shards / "model.safetensors").write_bytes((plain / "model.safetensors").read_bytes())
    assert names(shards) == ["model.safetensors"]


IN_THE_FOLDER, TABLE = "not the name of a file in the same folder", "must hold `metadata` and a `weight_map`"
# Changes of the index, or of its weight_map where one has the key "a", and what is said of them.
DAMAGES = [
    ({"weight_map": None}, TABLE),
    ({"metadata": None}, TABLE),
    ({"weight_map": {}}, TABLE),
    ({"weight_map": ["model.safetensors"]}, TABLE),
    ({"a": "../model.safetensors"}, IN_THE_FOLDER),
    ({"a": "/model.safetensors"}, IN_THE_FOLDER),
    ({"a": "..\\model.safetensors"}, IN_THE_FOLDER),
    ({"a": ""}, IN_THE_FOLDER),
    ({"a": ["model.safetensors"]}, IN_THE_FOLDER),
    ({"a": "a" * 9999 + ".safetensors"}, IN_THE_FOLDER),
    ({"a": "a.bin"}, r"'a\.bin': weights are safetensors files; nothing is unp"),
    ({"a": "b.safetensors"}, r"b\.safetensors is missing"),
]


def test_a_damaged_index(shards):
    file = shards / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    for change, message in DAMAGES:
        changed = index | ({"weight_map": index["weight_map"] | change} if "a" in change else change)
        file.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))
        with pytest.raises(CheckpointError, match=message):
            names(shards)


def test_an_index_that_is_no_table(shards):
    for text in ("", "[]", "3", "null", "{", "[" * 10**5, '{"a": ' + "9" * 5000 + "}", "\xff"):
        (shards / "model.safetensors.index.json").write_text(text, encoding="latin-1")
        with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json (is damaged|cannot be read)"):
            names(shards)


def test_the_name_that_a_configuration_gives(plain):
    for name in ("../plain/model.safetensors", str(plain / "model.safetensors")):
        with pytest.raises(CheckpointError, match="not the name of a file in the same folder"):
            folder_files(plain, name=name)


def test_what_is_there_instead_is_named(plain):
    (plain / "model.safetensors").rename(plain / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"It holds pytorch_model\.bin: .*nothing is unpickled"):
        names(plain)


TOO_MUCH = [
    ({"num_hidden_layers": 31}, "num_hidden_layers is 31, but the weight files hold 30 tensors"),
    ({"vision_config": {"depths": [1, 31]}}, "depths is 31, but"),
    ({"a": {"b": [{"width": 2**24 + 8001}]}}, "width is 16785217, but the weight files hold 1,000 bytes"),
    ({"width": -(10**400)}, r"width is beyond 10\^20"),
    ({"hidden_size": -28}, "hidden_size is -28; it must be positive"),
    ({"vision_config": {"num_attention_heads": 0}}, "num_attention_heads is 0; it must be positive"),
    ({"patch_size": [4, 0]}, "patch_size is 0; it must be positive"),
    ({"depths": [1] * 10_000}, "depths has 10,000 entries, but the weight files hold 30 tensors"),
    ({"hidden_sizes": [12] * 10_000}, "hidden_sizes has 10,000 entries"),
    ({"vision_config": {"names": ["x"] * 65}}, "names has 65 entries"),
    ({"depths": [1] * 31}, "depths is 31, but the weight files hold 30 tensors"),
    ({"num_layers": [16, 15]}, "num_layers is 31"),
]


def test_sizes_and_lists_that_no_file_can_fill():
    for values, message in TOO_MUCH:
        with pytest.raises(CheckpointError, match=message):
            check_sizes(values, tensors=30, stored=1000)


def test_sizes_that_may_be():
    check_sizes(
        {"num_hidden_layers": 30, "width": 2**24 + 8000, "a": None, "b": 1e300, "c": "layers", "d": True}, 30, 1000
    )


def test_a_whole_folder(plain):
    config = AutoConfig.from_pretrained(plain)
    check_folder(plain, config)
    config.num_hidden_layers = 10**6
    with pytest.raises(CheckpointError, match="num_hidden_layers"):
        check_folder(plain, config)


def test_names_of_classes_and_numbers_of_others_are_no_sizes(tmp_path):
    """What `save_pretrained` wrote is loaded again, whatever the labels are called, with all that somebody noted."""
    names = ["heads", "tails", "basketball players", "hidden_size"]
    config, labels = vit(num_labels=4), {name: i + 100 * (i == 2) for i, name in enumerate(names)}
    config.label2id, config.id2label = labels, {i: name for name, i in labels.items()}
    config.trained_at, config.flops, config.most_layers = 1_795_410_249, 17_600_000_000, 10**6
    model = proxbit.pack(proxbit.binarize(ViTForImageClassification(config)))
    model.save_pretrained(tmp_path)
    again = ViTForImageClassification.from_pretrained(tmp_path).config
    assert again.label2id == labels and again.trained_at == config.trained_at


def test_of_a_float_checkpoint_nothing_is_asked(tmp_path):
    """It is transformers' own."""
    model = ViTForImageClassification(vit())
    model.save_pretrained(tmp_path)
    Path(tmp_path / "extra.bin").write_bytes(b"x")
    assert type(model).from_pretrained(tmp_path).config.num_hidden_layers == 2


def test_lists_that_may_be():
    check_sizes(
        {"depths": [15, 15], "feature_layers": [20, 25, 30], "image_mean": [0.5] * 64, "num_heads": [30] * 9}, 30, 1000
    )


def test_no_more_patterns_than_tensors(plain):
    config = json.loads((plain / "config.json").read_text())
    cases = [(99, field) for field in ("include", "modules_to_not_convert", "learned_attention", "overrides")]
    for count, field in [*cases, (100_000, "include"), (10_001, "overrides")]:
        patterns = [f"{i}" for i in range(count)]
        values = {field: dict.fromkeys(patterns, {}) if field == "overrides" else patterns}
        changed = config | {"quantization_config": config["quantization_config"] | values}
        (plain / "config.json").write_text(json.dumps(changed))
        told = "has 99 patterns, but the w" if count == 99 else f"has {count:,} patterns; there may be"
        with pytest.raises(ProxbitError, match=f"{field} {told}"):
            ViTForImageClassification.from_pretrained(plain)
