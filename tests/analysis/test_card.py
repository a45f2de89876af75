"""The quantization card: complete or refused, its totals are those of the files, and it comes back from its file."""

import json
from dataclasses import replace

import pytest
import transformers as hf
from torch import nn

import proxbit
from proxbit.analysis.card import CARD_FIELDS, CARD_NAME, QuantizationCard, quantization_card
from proxbit.errors import CardError
from tiny_models import FAMILIES, vit

# Every field of the schema that a card must have: methods of Garg et al., and what the issue adds to them.
WANTED = """
model_id checkpoint_sha baseline_top1 quantized_top1 dataset split task epochs labelled_samples distillation_teacher
weight_bits weight_levels weight_symmetry weight_granularity scale_dtype scale_count activation_bits activation_symmetry
activation_granularity static_or_dynamic attention_prob_bits softmax_layernorm_precision first_layer_bits
last_layer_bits skip_precision bias_bits accumulator_bits norm_folding mixed_precision_policy avg_weight_bits
model_bytes compression_ratio peak_activation_bytes binary_ops float_ops simulated_or_kernel latency_source
calibration_observer calibration_samples seeds std
""".split()

RUN = {
    "model_id": "me/vit",
    "base_model": "google/vit",
    "dataset": "Digits",
    "split": "test",
    "train_samples": 1437,
    "epochs": 3.0,
    "steps": 90,
    "seeds": [1, 2],
    "std": 0.01,
    "teacher": "none",
    "metrics": {"float": {"accuracy": 0.97}, "hard": {"accuracy": 0.95}},
}


@pytest.fixture(scope="module")
def model():
    return proxbit.pack(proxbit.binarize(hf.ViTForImageClassification(vit())))


@pytest.fixture(scope="module")
def card(model):
    return quantization_card(model, run=RUN)


def test_every_field_is_there_and_explained(card):
    names = [field.name for field in CARD_FIELDS]
    assert set(WANTED) <= set(names) and len(set(names)) == len(names)
    assert all(field.meaning and field.group for field in CARD_FIELDS)
    assert list(card.to_dict()) == names


@pytest.mark.parametrize(
    ("family", "state"), [("vit", "latent"), ("swin", "packed"), ("clip", "float"), ("mobilevit", "packed")]
)
def test_totals_are_those_of_the_files(family, state, tmp_path):
    model = FAMILIES[family]()
    if state != "float":
        proxbit.binarize(model)
    if state == "packed":
        proxbit.pack(model)
    model.save_pretrained(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    card = quantization_card(model, files=[tmp_path / "model.safetensors"])
    assert card.model_bytes == len(data)
    assert card.tensor_bytes == len(data) - 8 - int.from_bytes(data[:8], "little")
    assert card.compression_ratio == pytest.approx(card.float32_bytes / len(data))
    assert (card.compression_ratio > 1.5) == (state == "packed")
    assert quantization_card(model).files == card.files, "a temporary copy is the same file"


def test_a_plain_module_has_a_card():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    card = quantization_card(proxbit.pack(proxbit.binarize(model, proxbit.BinarizationConfig(include=["0"]))))
    assert (card.state, card.binary_parameters, card.first_layer_bits) == ("packed", 256, 1)
    assert card.weight_quantizer == "bnn++" and card.binary_ops is None


def test_facts_of_the_run(card):
    told = {
        name: getattr(card, name) for name in ("model_id", "base_model", "dataset", "split", "epochs", "seeds", "std")
    }
    assert told == {name: RUN[name] for name in told}
    assert (card.labelled_samples, card.distillation_teacher, card.task) == (1437, "none", "QAT")
    assert (card.baseline_top1, card.quantized_top1) == (0.97, 0.95)


def test_what_no_run_tells_is_null(model):
    card = quantization_card(model)
    null = {name for name, value in card.to_dict().items() if value is None}
    assert null == {
        *("model_id", "base_model", "latency_source", "task", "dataset", "split", "epochs", "labelled_samples"),
        *("distillation_teacher", "seeds", "baseline_top1", "quantized_top1", "std", "calibration_errors"),
    }


def test_the_packed_model_speaks_for_itself(model):
    metrics = RUN["metrics"] | {"packed": {"accuracy": 0.94}}
    assert quantization_card(model, run=RUN | {"metrics": metrics, "steps": 0}).quantized_top1 == 0.94
    assert quantization_card(model, run={"steps": 0}).task == "PTQ"
    assert quantization_card(model, run={"metrics": {"hard": {"f1": 0.5}}}).quantized_top1 is None


def test_it_comes_back_from_its_file(card, tmp_path):
    assert card.save(tmp_path) == tmp_path / CARD_NAME
    assert QuantizationCard.load(tmp_path) == card == QuantizationCard.load(card.save(tmp_path / "other.json"))
    assert json.loads((tmp_path / CARD_NAME).read_text()) == card.to_dict()


def without(values, name):
    return {key: value for key, value in values.items() if key != name}


def test_no_field_may_be_missing_or_of_a_wrong_kind(card):
    for field in CARD_FIELDS:
        with pytest.raises(CardError, match=rf"{field.name} is missing; say null if it is unknown"):
            QuantizationCard.from_dict(without(card.to_dict(), field.name))
        with pytest.raises(CardError, match=rf"{field.name} must be {field.kind} or null"):
            replace(card, **{field.name: object()})


def test_unknown_fields_are_refused(card):
    with pytest.raises(CardError, match="'weight_bit' is no field"):
        QuantizationCard.from_dict(card.to_dict() | {"weight_bit": 1})


TOTALS = {
    "checkpoint_sha": "checkpoint_sha is 0{64}, but SHA-256 of the listing",
    "model_bytes": r"but sum of the bytes of files is \d+; model_bytes is \d+, but tensor_bytes \+ header_bytes",
    "header_bytes": r"model_bytes is \d+, but tensor_bytes \+ header_bytes is \d+",
    "tensor_bytes": r"total_bits is \d+, but 8 tensor_bytes is \d+",
    "binary_parameters": r"but binary_parameters \+ float_parameters is \d+",
    "total_bits": r"avg_weight_bits is [\d.]+, but total_bits / total_parameters is [\d.]+",
    "avg_weight_bits": "avg_weight_bits is",
    "float32_bytes": r"compression_ratio is [\d.]+, but float32_bytes / model_bytes is [\d.]+",
}


def test_totals_must_add_up(card):
    for name, message in TOTALS.items():
        changed = "0" * 64 if name == "checkpoint_sha" else getattr(card, name) + 1
        with pytest.raises(CardError, match=message):
            replace(card, **{name: changed})


def test_totals_of_unknown_parts_are_let_be(card):
    """What is null contradicts nothing."""
    parts = {"files": None, "header_bytes": None, "float32_bytes": None}
    assert replace(card, **parts).model_bytes == card.model_bytes


def test_files_of_another_model_are_refused(model, tmp_path):
    hf.ViTForImageClassification(vit(num_labels=5)).save_pretrained(tmp_path)
    with pytest.raises(CardError, match="but tensor_bytes"):
        quantization_card(model, files=[tmp_path / "model.safetensors"])


def test_files_that_are_no_card(tmp_path):
    with pytest.raises(CardError, match="cannot be read as a quantization card"):
        QuantizationCard.load(tmp_path)
    texts = {
        "{": "cannot be read as a quantization card",
        "[]": "it holds no JSON object",
        '{"card_format": 2}': "has card_format 2; this proxbit reads 1",
        '{"card_format": 1}': "model_id is missing",
    }
    for text, message in texts.items():
        (tmp_path / CARD_NAME).write_text(text)
        with pytest.raises(CardError, match=message):
            QuantizationCard.load(tmp_path)


def test_markdown_has_one_row_a_field(card):
    rows = [line.strip("| ").split(" | ")[:2] for line in card.to_markdown().splitlines()[2:]]
    texts = {name.strip("`"): text for name, text in rows}
    assert list(texts) == [field.name for field in CARD_FIELDS]
    assert (texts["model_bytes"], texts["latency_source"]) == (f"{card.model_bytes:,}", "unknown")
    assert texts["mixed_precision_policy"] == "W32A32: 2, W1A32: 12"
