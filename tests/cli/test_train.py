"""`proxbit train`: fields from options and files, images to packed model, and what is refused."""

import json
import shutil

import pytest
import torch
import transformers as hf
from typer.testing import CliRunner

import proxbit
from picture_folders import odd_folder, tiny_classifier
from proxbit.cli.app import app
from proxbit.cli.train import load_for, parse
from proxbit.errors import CheckpointError, ConfigError, DataError, ModelStateError
from proxbit.patching import state_of

FAST = ["--max_steps", "2", "--logging_steps", "1", "--report_to", "none", "--use_cpu", "true", "--save_strategy", "no"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, photographs):
    folder = tmp_path_factory.mktemp("train")
    tiny_classifier(folder / "float")
    odd_folder(folder / "photos", photographs)
    return folder


def run(*arguments):
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def test_pictures_make_a_packed_model(place, tmp_path):
    options = ["--model", place / "float", "--teacher", place / "float", "--data", place / "photos", *FAST]
    done = run(*options, "--eval_fraction", "0.25", "--recipe", "w1a8", "--output_dir", tmp_path / "out")
    assert done.exit_code == 0, done.exception
    assert "2 left out:" in done.stderr and "accuracy" in done.stdout
    assert "│ train │ held out, 25% │" in done.stderr.replace("┃", "│")
    assert not any(noise in done.stderr for noise in ("pin_memory", "Downloading", "Flattening"))
    out = tmp_path / "out"
    config = json.loads((out / "packed" / "config.json").read_text())["quantization_config"]
    assert (config["state"], config["activations"]) == ("packed", "int8")
    assert 0 <= json.loads((out / "eval_results.json").read_text())["eval_accuracy"] <= 1
    states = {name: hf.AutoModelForImageClassification.from_pretrained(out / name) for name in ("latent", "packed")}
    assert {name: state_of(model) for name, model in states.items()} == {"latent": "latent", "packed": "packed"}
    assert (out / "packed" / "preprocessor_config.json").is_file()
    card = json.loads((out / "packed" / "quantization_card.json").read_text())
    assert card["dataset"] == "photos"
    assert card["split"] == "25% of train, held out"
    assert states["packed"].config.label2id == {"flower": 0, "other": 1, "temple": 2}
    start = hf.AutoModelForImageClassification.from_pretrained(place / "float")
    assert not torch.equal(states["latent"].classifier.weight, start.classifier.weight)


def test_other_classes_get_a_new_head_from_a_file(place, tmp_path):
    tiny_classifier(tmp_path / "other", names=("a", "b", "c"))
    settings = {"model": str(tmp_path / "other"), "data": str(place / "photos"), "output_dir": str(tmp_path / "out")}
    (tmp_path / "run.json").write_text(json.dumps(settings))
    done = run(tmp_path / "run.json", *FAST)
    assert done.exit_code == 0, done.exception
    assert "gets a new head for 2 classes: all of its rows are new." in done.stderr
    made = hf.AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "packed")
    assert made.config.id2label == {0: "flower", 1: "temple"} and made.classifier.weight.shape[0] == 2
    again = run(tmp_path / "run.json", *FAST, "--output_dir", tmp_path / "again")
    assert again.exit_code == 0, again.exception
    files = [tmp_path / name / "latent" / "model.safetensors" for name in ("out", "again")]
    assert files[0].read_bytes() == files[1].read_bytes(), "the seed is that of the new head too"


def test_options_win_over_the_file(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "model: m\ndata: d\nlearning_rate: 1e-4\nmax_steps: 7\nmu_end: 5\nremove_unused_columns: true\n"
    )
    given, args = parse([str(tmp_path / "a.yaml"), "--max_steps", "9", "--data", "e", "--use_cpu", "true"])
    assert (given.model, given.data, given.teacher) == ("m", "e", None)
    assert (args.learning_rate, args.max_steps, args.mu_end) == (1e-4, 9, 5.0)
    assert args.remove_unused_columns is False


def test_a_value_may_have_the_name_of_a_file_of_settings():
    given, _ = parse(["--model", "m", "--data=d.json", "--teacher", "t.yaml"])
    assert (given.data, given.teacher) == ("d.json", "t.yaml")


@pytest.mark.parametrize(
    ("text", "arguments", "words"),
    [
        ("lerning_rate: 1", [], "there is no field 'lerning_rate'. Did you mean learning_rate"),
        ("learning_rate: [1]", [], "learning_rate takes one value"),
        ("learning_rate: fast", [], "invalid float value: 'fast'"),
        ("- 1", [], "must hold fields"),
        ("a: [", [], "cannot be read as YAML or JSON"),
        ("model: m", [], "required: --data"),
        ("model: m", ["--data", "d", "run.yaml"], "A file of settings comes first: `proxbit train run.yaml"),
        ("data: d", ["--model", "m", "--epochs", "3"], "Unknown: --epochs 3"),
        ("data: d", ["--model", "m", "--recipe", "w9"], "Unknown recipe 'w9'"),
        ("data: d", ["--model", "m", "--eval_fraction", "1"], "eval_fraction"),
        ("data: d", ["--model", "m", "--eval_strategy", "now"], "now"),
        ("data: d", ["--model", "m", "--per_device_train_batch_size", "0"], "must be 1 or more, not 0"),
    ],
    ids=[
        "field",
        "list",
        "number",
        "no fields",
        "not yaml",
        "missing",
        "late file",
        "option",
        "recipe",
        "fraction",
        "choice",
        "batch",
    ],
)
def test_fields_that_do_not_work_are_refused(tmp_path, text, arguments, words):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(proxbit.ProxbitError) as refused:
        parse([str(tmp_path / "a.yaml"), *arguments])
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_file_that_is_not_there():
    with pytest.raises(ConfigError, match="nowhere.yaml cannot be read"):
        parse(["nowhere.yaml"])


def test_what_the_trainer_does_not_take_is_refused(place, tmp_path):
    good = ["--model", place / "float", "--data", place / "photos", "--output_dir", tmp_path / "out"]
    refused = run(*good, *FAST, "--report_to", "nobody").exception
    assert isinstance(refused, ConfigError) and "nobody is not supported" in str(refused)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "environment"),
    [(["--fsdp", "full_shard"], {}), ([], {"ACCELERATE_USE_FSDP": "true"})],
    ids=["option", "environment"],
)
def test_a_model_that_is_spread_is_refused(place, tmp_path, monkeypatch, options, environment):
    """As `accelerate launch` says it by the environment, too."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    good = ["--model", place / "float", "--data", place / "photos", "--output_dir", tmp_path / "out"]
    refused = run(*good, *FAST, *options).exception
    assert isinstance(refused, ConfigError) and "FSDP or DeepSpeed" in str(refused)
    assert not (tmp_path / "out").exists()


def test_refusals_write_nothing(place, tmp_path):
    model = hf.ViTForImageClassification.from_pretrained(place / "float")
    proxbit.pack(proxbit.binarize(model)).save_pretrained(tmp_path / "packed")
    hf.ViTImageProcessorPil().save_pretrained(tmp_path / "packed")
    tiny_classifier(tmp_path / "stranger", names=("temple", "other", "flower"))
    good = {"--model": place / "float", "--data": place / "photos", "--output_dir": tmp_path / "out"}
    for changes, error in (
        ({"--model": tmp_path / "nowhere"}, CheckpointError),
        ({"--model": tmp_path / "packed"}, ModelStateError),
        ({"--data": tmp_path / "nowhere"}, DataError),
        ({"--eval_split": "test"}, DataError),
        ({"--teacher": tmp_path / "stranger"}, ConfigError),
        ({"--resume_from_checkpoint": tmp_path}, CheckpointError),
    ):
        options = [part for pair in (good | changes).items() for part in pair]
        assert isinstance(run(*options, *FAST).exception, error), changes
    assert not (tmp_path / "out").exists()
    taken = [part for pair in (good | {"--output_dir": place / "float"}).items() for part in pair]
    assert isinstance(run(*taken, *FAST).exception, CheckpointError)


def test_a_run_that_was_killed_goes_on(place, tmp_path):
    """The same command says how, and the words are taken."""
    out = tmp_path / "out"
    options = ["--model", place / "float", "--data", place / "photos", "--output_dir", out, *FAST]
    saving = ["--save_strategy", "steps", "--save_steps", "1"]
    assert run(*options, *saving).exit_code == 0
    for folder in ("latent", "packed", "checkpoint-2"):
        shutil.rmtree(out / folder)
    refused = run(*options, *saving).exception
    assert isinstance(refused, CheckpointError) and "--resume_from_checkpoint last" in str(refused)
    for word in ("last", "True"):
        done = run(*options, *saving, "--resume_from_checkpoint", word)
        assert done.exit_code == 0, done.exception
        assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 2
        for folder in ("latent", "packed"):
            shutil.rmtree(out / folder)


def test_rows_of_labels_that_stay_are_kept(place, tmp_path, capsys):
    tiny_classifier(tmp_path / "fruit", names=("banana", "apple", "cherry"))
    model, numbers = load_for(str(tmp_path / "fruit"), ["apple", "banana", "zucchini"])
    assert "the rows of 'apple', 'banana' are kept, the others are new" in capsys.readouterr().err
    old = hf.ViTForImageClassification.from_pretrained(tmp_path / "fruit").classifier.weight
    assert torch.equal(model.classifier.weight[:2], old[[1, 0]]) and numbers == {0: 0, 1: 1, 2: 2}
    assert not any(torch.equal(model.classifier.weight[2], row) for row in old)


def test_a_class_to_evaluate_with_is_one_to_train_with(place, tmp_path):
    for split, names in (("train", ("flower", "temple")), ("test", ("flower", "other", "temple"))):
        for name in names:
            (tmp_path / "data" / split / name).mkdir(parents=True)
            source = place / "photos" / "flower" / "color.jpg"
            (tmp_path / "data" / split / name / "1.jpg").write_bytes(source.read_bytes())
    refused = run("--model", place / "float", "--data", tmp_path / "data", "--output_dir", tmp_path / "out", *FAST)
    assert isinstance(refused.exception, DataError) and "train has none of: 'other'" in str(refused.exception)
    assert not (tmp_path / "out").exists()


def test_memory_is_pinned_for_accelerators_only():
    _, args = parse(["--model", "m", "--data", "d", "--use_cpu", "true"])
    assert args.dataloader_pin_memory is False


@pytest.mark.parametrize("word", ["last", "True", "true"])
def test_the_last_checkpoint_has_a_name(word):
    _, args = parse(["--model", "m", "--data", "d", "--use_cpu", "true", "--resume_from_checkpoint", word])
    assert args.resume_from_checkpoint is True
