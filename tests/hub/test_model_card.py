"""Model cards: metadata that the Hub's own library reads, a snippet that runs, nothing that nobody knows."""

import ast
import re

import pytest
import transformers as hf
import yaml
from huggingface_hub import ModelCard
from PIL import Image

import proxbit
from proxbit.analysis.card import CARD_FIELDS, QuantizationCard, quantization_card
from proxbit.errors import CardError
from proxbit.hub.model_card import model_card, pipeline_tag, rename
from proxbit.hub.release import write_release
from tiny_models import FAMILIES, SIDE, vit

RUN = {
    "model_id": "me/vit-1bit",
    "base_model": "google/vit-base-patch16-224",
    "license": "apache-2.0",
    "recipe": "w1a32",
    "arguments": {"learning_rate": 3e-4},
    "dataset": "Beans | leaves",
    "dataset_id": "AI-Lab-Makerere/beans",
    "split": "test",
    "eval_samples": 128,
    "seeds": [0],
    "std": 0.012,
    "metrics": {
        "float": {"accuracy": 0.97, "loss": 0.1},
        "hard": {"accuracy": 0.95, "loss": 0.2},
        "packed": {"accuracy": 0.94, "balanced_accuracy": 0.9},
    },
    "latency": {
        "batch": 1,
        "rounds": 11,
        "milliseconds": {"float": 100.0, "packed, float": 43.21},
        "spread": {"float": 0.02, "packed, float": 0.03},
        "machine": "A processor of 1971, 1 cores",
    },
}


@pytest.fixture(scope="module")
def model():
    labels = {0: "angular leaf spot", 1: "bean rust", 2: "healthy"}
    return proxbit.pack(proxbit.binarize(hf.ViTForImageClassification(vit(id2label=labels))))


@pytest.fixture(scope="module")
def full(model):
    return model_card(model, quantization_card(model, run=RUN), run=RUN, processing_class=object())


@pytest.fixture(scope="module")
def bare(model):
    return model_card(model, quantization_card(model))


def metadata(card):
    """The front matter, read without the library that wrote it."""
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", str(card), re.DOTALL)[1])


def section(card, title):
    return card.text.split(f"\n## {title}\n")[1].split("\n## ")[0].strip()


def test_metadata_of_a_known_run(full):
    found = metadata(full)
    (index,) = found.pop("model-index")
    assert found == {
        "license": "apache-2.0",
        "base_model": "google/vit-base-patch16-224",
        "pipeline_tag": "image-classification",
        "library_name": "transformers",
        "datasets": ["AI-Lab-Makerere/beans"],
        "metrics": ["accuracy", "balanced_accuracy"],
        "tags": ["proxbit", "quantization", "binarization", "1-bit", "packed"],
    }
    assert index["name"] == "me/vit-1bit"
    (result,) = index["results"]
    assert result["task"] == {"type": "image-classification"}
    assert result["dataset"] == {"name": "Beans | leaves", "type": "AI-Lab-Makerere/beans", "split": "test"}
    assert [(each["type"], each["value"]) for each in result["metrics"]] == [
        ("accuracy", 0.94),
        ("balanced_accuracy", 0.9),
    ]


@pytest.mark.parametrize("which", ["full", "bare"])
def test_the_library_of_the_hub_reads_it(which, request, tmp_path):
    """Without `ignore_metadata_errors` it refuses an index that is none."""
    card = request.getfixturevalue(which)
    card.save(tmp_path / "README.md")
    again = ModelCard.load(tmp_path / "README.md")
    assert again.data.to_dict() == card.data.to_dict() and again.text == card.text


def test_what_is_unknown_is_left_out_and_said(bare):
    assert set(metadata(bare)) == {"pipeline_tag", "library_name", "tags"}
    assert section(bare, "Training") == "How it was trained is unknown."
    assert section(bare, "Results") == "Unknown: no evaluation is recorded."
    assert section(bare, "Latency").startswith("Not measured.")
    limits = section(bare, "Limits")
    assert "Its accuracy is unknown" in limits and "Its license is unknown" in limits
    assert "None" not in bare.text and "null" not in bare.text


def test_a_card_that_knows_nothing_makes_a_model_card(model):
    """Every field of a quantization card may be null."""
    known = {"card_format": 1, "state": "packed"}
    card = QuantizationCard(**{field.name: known.get(field.name) for field in CARD_FIELDS})
    text = model_card(model, card).text
    assert "an unknown share of its unknown parameters" in text and "None" not in text
    assert "| the same model in float32 | unknown |" in text


def test_results_name_every_variant(full):
    rows = [line.strip("| ").split(" | ") for line in section(full, "Results").splitlines() if line.startswith("|")]
    assert rows[0] == ["model", "accuracy", "loss", "balanced_accuracy"]
    assert rows[2:] == [
        ["float", "0.97", "0.1", "unknown"],
        ["latent, soft (simulated)", "unknown", "unknown", "unknown"],
        ["latent, hard (simulated)", "0.95", "0.2", "unknown"],
        ["packed", "0.94", "unknown", "0.9"],
    ]
    assert "128 examples; standard deviation of the accuracy 0.012" in section(full, "Results")


def test_the_rest_of_the_text(full, model):
    card = quantization_card(model, run=RUN)
    assert "| packed, float | 43.21 | 3% |" in section(full, "Latency")
    assert "A processor of 1971" in section(full, "Latency")
    assert f"| model.safetensors | {card.model_bytes:,} |" in section(full, "Size")
    assert "`recipe` | w1a32" in section(full, "Training") and "Unknown: `train_split`" not in section(full, "Training")
    assert r"Beans \| leaves" in section(full, "Training")
    assert "3 classes apart: angular leaf spot, bean rust, healthy." in section(full, "Intended use")
    assert section(full, "Quantization card").endswith(card.to_markdown())
    limits = section(full, "Limits")
    assert "evaluated on Beans | leaves only" in limits and "unknown: ask" not in limits
    assert "limits of google/vit-base-patch16-224" in limits


def test_a_latent_model_is_not_called_1_bit():
    model = proxbit.binarize(hf.ViTForImageClassification(vit()))
    run = {"metrics": {"hard": {"accuracy": 0.5}}}
    card = model_card(model, quantization_card(model, run=run), run=run, name="mine", tags=("leaves",), language="en")
    assert metadata(card)["tags"] == ["proxbit", "quantization", "binarization", "latent", "leaves"]
    assert metadata(card)["language"] == "en" and "model-index" not in metadata(card)
    assert "1-bit" not in card.text and "It is simulated" in card.text and card.text.startswith("\n# mine\n")


def test_tasks_of_the_families():
    others = {
        "image-feature-extraction": ("dinov3", "dinov3 convnext"),
        "object-detection": ("detr", "yolos"),
        "image-segmentation": ("segformer", "upernet", "maskformer", "mask2former", "dpt segmentation"),
        "depth-estimation": ("dpt depth",),
        None: ("clip with text",),
    }
    expected = dict.fromkeys(FAMILIES, "image-classification")
    expected |= {name: task for task, names in others.items() for name in names}
    assert {name: pipeline_tag(make()) for name, make in FAMILIES.items()} == expected
    assert pipeline_tag(hf.ViTModel(vit())) == "image-feature-extraction"
    assert pipeline_tag(hf.ViTForMaskedImageModeling(vit())) is None
    sizes = dict(hidden_size=36, num_hidden_layers=1, num_attention_heads=4, intermediate_size=50)
    two = hf.CLIPModel(hf.CLIPConfig(vision_config=sizes | {"image_size": SIDE, "patch_size": 8}, text_config=sizes))
    assert pipeline_tag(two) is None


def test_a_record_that_is_not_valid(model):
    with pytest.raises(CardError, match="'licence' is no field"):
        model_card(model, quantization_card(model), run={"licence": "mit"})


@pytest.mark.parametrize("processor", [True, False], ids=["pipeline", "model"])
def test_the_snippet_runs(model, tmp_path, photographs, processor, monkeypatch, capsys):
    """Beside the release, with a picture of the user's."""
    made = hf.ViTImageProcessor(size={"height": SIDE, "width": SIDE}) if processor else None
    folder = write_release(model, tmp_path / "beans", processing_class=made)
    Image.fromarray(photographs[0][:64, :64]).save(tmp_path / "picture.jpg")
    text = section(ModelCard.load(folder / "README.md"), "How to use it")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert code.startswith("import proxbit")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert ("bean rust" in printed) == processor and ("logits" in printed) != processor


@pytest.mark.parametrize("processor", [True, False], ids=["pipeline", "model"])
def test_the_snippet_has_the_attention_of_the_model(tmp_path, photographs, processor, monkeypatch):
    """No checkpoint tells it: loaded without, the model would compute something else."""
    binary = hf.ViTForImageClassification(vit())
    binary.set_attn_implementation("proxbit_binary")
    made = hf.ViTImageProcessor(size={"height": SIDE, "width": SIDE}) if processor else None
    folder = write_release(proxbit.pack(proxbit.binarize(binary)), tmp_path / "binary", processing_class=made)
    Image.fromarray(photographs[0][:64, :64]).save(tmp_path / "picture.jpg")
    renamed = rename((folder / "README.md").read_text(), None, "binary")
    code = re.search(r"```python\n(.*?)```", renamed, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    loaded = names["model"].model if processor else names["model"]
    assert loaded.config._attn_implementation == "proxbit_binary"


def test_what_somebody_else_wrote_is_not_renamed():
    text = "---\nlicense: mit\n---\n\n# Beautiful digits, by Ada\n\nMy text.\n"
    assert rename(text, None, "me/tiny") == text


def test_the_snippet_of_a_model_that_takes_no_picture_alone_loads_it(tmp_path, monkeypatch):
    folder = write_release(proxbit.pack(proxbit.binarize(FAMILIES["clip with text"]())), tmp_path / "two")
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert type(names["model"]) is hf.CLIPModel and "torch" not in names


def test_names_and_labels_stay_text():
    """No tag, link or picture comes from a label, a name or a data set, and no code into the example."""
    hostile = '<script>alert(1)</script>\n# ![x](http://127.0.0.1/x.png) "); import os; ("'
    model = proxbit.pack(proxbit.binarize(hf.ViTForImageClassification(vit(id2label={0: hostile, 1: "b"}))))
    run = {"dataset": hostile, "model_id": None, "split": "test", "metrics": {"packed": {"accuracy": 0.5}}}
    text = str(model_card(model, quantization_card(model, run=run), run=run, name=hostile))
    body = text.split("---\n", 2)[2]
    assert body.count("&lt;script>alert(1)&lt;/script> # !\\[x]") >= 3
    code = re.search(r"```python\n(.*?)```", body, re.DOTALL)[1]
    assert all(isinstance(each, (ast.Import, ast.ImportFrom, ast.Assign, ast.With)) for each in ast.parse(code).body)
    prose = body.replace(code, "")
    assert "<script" not in prose and "![" not in prose and "\n# !" not in prose


def test_a_card_of_long_names_is_short():
    """A label of 100,000 characters, and as many labels."""
    labels = {0: "x" * 10**5} | {i: f"\x1b[2J{i}" for i in range(1, 2000)}
    model = proxbit.pack(proxbit.binarize(hf.ViTForImageClassification(vit(num_labels=2000, id2label=labels))))
    run = {"dataset": "y" * 10**5, "metrics": {"packed": {"z" * 10**5: 0.5}}, "arguments": {"w" * 10**5: "v" * 10**5}}
    text = str(model_card(model, quantization_card(model, run=run), run=run, name="t" * 10**5))
    body = text.split("---\n", 2)[2]
    assert len(body) < 40_000 and "and 1980 more" in body and "\x1b" not in text
