"""What the pages of the benchmarks of speed say of their goals, from made-up times."""

import argparse
import copy
import importlib
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2ForImageClassification

import proxbit
from proxbit.analysis.environment import environment
from proxbit.analysis.timing import Timings

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch):
    """A program of the benchmarks or trials, as a module."""
    for folder in ("trials", "benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    return importlib.import_module


def test_the_cost_of_a_quantizer_is_taken_with_and_without_recomputation(script):
    for twice in (False, True):
        latent = torch.randn(4, 8, requires_grad=True)
        script("scale").quantizer(latent, twice)()
        assert latent.grad is not None


def test_a_goal_is_judged_by_the_number_that_is_printed(script):
    goal = script("report").Goal("speed", 3, 4)
    verdicts = [goal.verdict(value) for value in (None, 2.99, 2.996, 3.5, 4.0)]
    assert verdicts == ["not measured", "**missed**", "met", "met", "met, stretch too"]


def test_goals_of_linear_layers(script):
    """Geometric means over the shapes; the best int8 peer is the fastest at each shape."""
    linear = script("linear")
    results = [
        linear.Result(
            "ViT-B",
            shape,
            197,
            1,
            Timings(
                {
                    "torch fp32": (8.0,),
                    "torch.ao int8 dynamic": (torch_int8,),
                    "onnxruntime int8 dynamic": (4.0,),
                    "linear_w1a8": (1.0,),
                    "linear_w1a1": (own,),
                }
            ),
        )
        for shape, torch_int8, own in (((1, 2), 2.0, 0.5), ((3, 4), 8.0, 0.125))
    ]
    found = {goal.what: value for goal, value in linear.against_goals(results, 6e9).items()}
    assert found["`linear_w1a1` / torch fp32, ViT-B, M=197"] == pytest.approx((16 * 64) ** 0.5)
    assert found["`linear_w1a8` / the best int8 peer, ViT-B, M=197"] == pytest.approx((2 * 4) ** 0.5)
    assert found["`linear_w1` / torch fp32, ViT-B, M=197"] is None
    assert found["`linear_w1a1` / torch fp32, ViT-S, M=197"] is None
    assert found["`pack_signs`"] == 6


def test_goals_of_whole_models(script):
    vit = script("vit")
    seconds = {"float": (8.0,), "int8 dynamic": (3.0,), "packed, sign": (1.0,), "packed, int8": (2.0,)}
    result = vit.Result("ViT-B", 1, 1, Timings(seconds), {})
    loads = {"cold": Timings({"float": (4.0,), "packed": (0.5,)})}
    found = {goal.what: value for goal, value in vit.against_goals([result], loads).items()}
    assert list(found.values()) == [8, 4, None, 1.5, 8]


def test_the_page_and_its_numbers_are_written(script, tmp_path, capsys):
    report, here = script("report"), environment()
    measured = {report.Goal("fast", 2): 1.0}
    lines = ["title", "", *report.goal_table(measured, here)]
    report.finish("page", lines, {"goals": report.goals_data(measured)}, here, tmp_path)
    page = (tmp_path / "page.md").read_text()
    assert page.strip() == capsys.readouterr().out.strip()
    assert "| fast | 2 x |  | 1.00 x | **missed** |" in page and f"`{here.level}`" in page
    data = json.loads((tmp_path / "page.json").read_text())
    assert data["goals"][0]["verdict"] == "missed" and data["environment"]["level"] == here.level


def test_limits_of_training(script):
    training = script("training")
    assert training.verdict("w1a32", "DeiT-S", 1.15, 1.104, False) == "at most 1.15, 1.10: met, met"
    assert training.verdict("w1a1", "DeiT-T", 1.61, 1.3, False) == "at most 1.60, 1.25: **missed**, **missed**"
    assert training.verdict("w1a8", "DeiT-S", 9.0, 9.0, False) == ""
    assert training.verdict("w1a32", "DeiT-B", 1.11, 1.05, False) == "at most 1.10, 1.05: **missed**, met"
    assert training.verdict("w1a32", "DeiT-B", 1.05, 1.06, True) == "at most 1.05, 1.05: met, **missed**"
    assert training.verdict("w1a1", "DeiT-S", 9.0, 9.0, True) == ""
    assert {*training.LIMITS, *training.LIMITS_OF_B} <= set(training.RECIPES)


def test_a_table_of_accuracy_pairs_folds_and_seeds(script):
    """Against float training of the same length, on the same fold with the same seed; runs without a partner wait."""
    accuracy = script("accuracy")
    runs = [("float, as long", "W32A32", 0, 0.9), ("float, as long", "W32A32", 1, 0.8), ("bnn++", "W1A8", 0, 0.85)]
    runs += [("bnn++", "W1A8", 1, 0.81), ("bnn++", "W1A8", 2, 0.1)]
    results = {accuracy.Run("digits-16", m, c, f, 0): {"accuracy": value, "start": "a"} for m, c, f, value in runs}
    page = "\n".join(accuracy.tables(results))
    assert "## Digits, width 16" in page and "| `bnn++` | 83.0 ± 2.0 (2.0 ± 3.0; 2) |" in page
    assert "| float, as long | 85.0 ± 5.0 (0.0 ± 0.0; 2) |" in page


def test_differences_and_goals_are_paired_too(script):
    accuracy = script("accuracy")
    runs = [("float, as long", "W32A32", 0, 0.95), ("bnn++", "W1A32", 0, 0.9), ("bc", "W1A32", 0, 0.87)]
    runs += [("float, as long", "W32A32", 1, 0.95), ("bnn++", "W1A32", 1, 0.94), ("bc", "W1A32", 1, 0.93)]
    results = {accuracy.Run("digits-16", m, c, f, 0): {"accuracy": value, "start": "a"} for m, c, f, value in runs}
    page = "\n".join(accuracy.tables(results) + accuracy.goal_lines(results))
    assert "| `bc` | -2.0 ± 1.0 (2) |" in page
    assert "| Digits, width 16, W1A32 | 2.5 | 3.0 ± 2.0 (2) | **missed** |" in page


def test_runs_of_different_starts_are_not_paired(script):
    """Fold 1 was done again on another float model, by one of the two rows only."""
    accuracy = script("accuracy")
    runs = [("float, as long", "W32A32", 0, 0.9, "a"), ("float, as long", "W32A32", 1, 0.8, "b")]
    runs += [("bnn++", "W1A8", 0, 0.85, "a"), ("bnn++", "W1A8", 1, 0.81, "a")]
    results = {accuracy.Run("digits-16", m, c, f, 0): {"accuracy": v, "start": at} for m, c, f, v, at in runs}
    assert "| `bnn++` | 85.0 (5.0; 1) |" in "\n".join(accuracy.tables(results))


def test_what_hardening_costs_is_that_of_each_run(script):
    """Pairs that are hard all along have no such row."""
    accuracy = script("accuracy")
    results = {}
    for fold, (soft, hard) in enumerate([(0.95, 0.94), (0.93, 0.90)]):
        results[accuracy.Run("digits-16", "bnn++", "W1A32", fold, 0)] = {"accuracy": hard, "soft": soft, "start": "a"}
        results[accuracy.Run("digits-16", "bc", "W1A32", fold, 0)] = {"accuracy": hard, "soft": hard, "start": "a"}
    table = "\n".join(accuracy.tables(results)).split("as it ships")[1]
    assert "| `bnn++` | 2.0 ± 1.0 (2) |" in table and "`bc`" not in table


def test_runs_that_are_finished_are_not_done_again(script, tmp_path):
    accuracy = script("accuracy")
    run = accuracy.Run("digits-16", "bc", "W1A1", 3, 1)
    path = tmp_path / "runs.jsonl"
    assert accuracy.known(path) == {}
    path.write_text(json.dumps({**vars(run), "accuracy": 0.5, "soft": 0.6}) + "\n")
    assert accuracy.known(path) == {run: {**vars(run), "accuracy": 0.5, "soft": 0.6}}


def test_runs_that_began_at_another_float_model_are_done_again(script, tmp_path):
    """But only where the cache has one: what was trained elsewhere is not lost with its folder."""
    accuracy = script("accuracy")
    options = argparse.Namespace(tasks=["digits-16"], seeds=1, folds=[0], columns=["W1A8"], methods=["bc"])
    options.cache, path = tmp_path / "cache", tmp_path / "runs.jsonl"
    runs = list(accuracy.wanted(options))
    assert [run.method for run in runs] == ["float", "float, as long", "post-training sign", "bc"]
    path.write_text("".join(json.dumps({**vars(run), "start": "a", "accuracy": 0.5}) + "\n" for run in runs))
    assert accuracy.missing(options, path) == []
    options.cache.mkdir()
    accuracy.start_file(runs[0], options.cache).write_bytes(b"another")
    assert accuracy.missing(options, path) == runs
    start = accuracy.start_of(runs[0], options.cache)
    path.write_text("".join(json.dumps({**vars(run), "start": start, "accuracy": 0.5}) + "\n" for run in runs[:3]))
    assert accuracy.missing(options, path) == runs[3:]


def test_every_method_trains_and_is_packed(script, tmp_path, monkeypatch):
    """All rows on two pictures of each digit, for one epoch."""
    accuracy = script("accuracy")
    train, test = accuracy.digits(0)
    few = accuracy.Images(train.pixels[:20], train.labels[:20])
    short(accuracy, monkeypatch, "digits-16", pictures=lambda fold: (few, test))
    binary = (accuracy.SIGN, "bnn++", accuracy.TORCHAO, "bnn++ hard from the start")
    for method in (accuracy.FLOAT, accuracy.LONGER, *binary):
        for column in ("W1A32", "W1A1") if method in (accuracy.SIGN, "bnn++") else ("W1A32",):
            result = accuracy.run(accuracy.Run("digits-16", method, column, 0, 0), tmp_path)
            assert 0 <= result["accuracy"] <= 1
    assert len(list(tmp_path.iterdir())) == 1


def short(accuracy, monkeypatch, key, **changes):
    """Make a task one of two steps."""
    task = replace(accuracy.TASKS[key], float_epochs=1, epochs=1, batch=10, **changes)
    monkeypatch.setitem(accuracy.TASKS, key, task)


def test_the_task_of_solar_cells_is_that_of_the_example(script, tmp_path, monkeypatch):
    accuracy = script("accuracy")
    images, labels = accuracy.solar.load_cells(uncertain=False, limit=25)
    pictures = accuracy.solar.make_dataset(images, labels, accuracy.solar.make_model(None)[1])
    monkeypatch.setattr(accuracy, "all_cells", lambda: (labels, pictures))
    train, test = accuracy.cells(1)
    assert len(train) == 20 and len(test) == 5 and test[0]["pixel_values"].shape == (3, 96, 96)
    short(accuracy, monkeypatch, "solar")
    for method in (accuracy.LONGER, accuracy.SIGN, "bnn++"):
        result = accuracy.run(accuracy.Run("solar", method, "W1A1", 1, 0), tmp_path)
        assert result["accuracy"] in (0, 0.2, 0.4, 0.6, 0.8, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["solar-1-0.safetensors"]


def test_every_engine_is_compared(script):
    """All files of the examples, but the one that the Trainer has on accelerators only."""
    configs = {path.stem for path in (ROOT / "examples" / "accelerate_configs").iterdir()}
    assert {row.config for row in script("engines").ROWS} == configs - {"fsdp2_bf16"} | {"one"}


def test_what_two_trainings_differ_by(script):
    """One flip of ten at step 2, three bits, and the loss."""
    engines = script("engines")

    def made(loss, flips, byte):
        curve = [{"loss": 1.0, "flip_ratio": 0.0}, {"loss": loss, "flip_ratio": flips}]
        packed = {"fc.weight": torch.tensor([[byte]], dtype=torch.uint8), "fc.weight_scale": torch.ones(1)}
        return {"curve": curve, "packed": packed, "weights": {"fc.weight": torch.zeros(1, 10)}}

    first, second = made(2.0, 0.5, 0b1110), made(2.25, 0.6, 0b0001_1000)
    assert engines.difference(first, second) == engines.Difference(0.25, 1, 3, 8, False)
    assert engines.difference(first, first) == engines.Difference(0, 0, 0, 8, True)
    found = engines.Found(engines.difference(first, second), engines.difference(first, first))
    assert engines.cells(engines.ROWS[1], found)[2:] == ["2.5e-01", "1", "3 of 8 (37.500%)", "yes"]


def test_a_row_says_why_there_is_nothing(script):
    engines = script("engines")
    said = engines.explanation("rank 0: Traceback\n  File x\nlib.SomeError: it | broke\n\nOther: ...\nValueError: so")
    cells = engines.cells(engines.ROWS[1], engines.Found(failed=said))
    assert said == "lib.SomeError: it | broke" and cells[2] == "lib.SomeError: it / broke"


def test_every_variant_of_the_closed_form_changes_it(script):
    """What is patched is what is read: a variant that changed nothing would say that a step is worth nothing."""
    posttraining = script("posttraining")
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(24, 24), torch.nn.ReLU(), torch.nn.Linear(24, 8))
    x = torch.randn(200, 24) @ torch.randn(24, 24)
    found = {}
    for name in posttraining.VARIANTS:
        if "feedback" not in name:  # These layers write into no residual stream.
            model = proxbit.binarize(copy.deepcopy(plain), proxbit.BinarizationConfig(include=["*"]))
            with posttraining.variant(name):
                proxbit.calibrate(model, x, progress=False)
            found[name] = tuple(layer.after for layer in model.calibration_report.layers)
    assert len(set(found.values())) == len(found)
    assert found["without compensation"] > found["without flips"] > found[posttraining.CLOSED]


def test_points_lost_are_judged_by_their_mean(script):
    posttraining = script("posttraining")
    rows = {}
    for fold, accuracy in enumerate((0.900, 0.890)):
        run = posttraining.Run("solar", fold, "W1A32", 256)
        numbers = {"float_accuracy": 0.9, "accuracy": accuracy, "balanced": 0.8, "kl": 0.1, "agreement": 0.9}
        rows[run] = asdict(run) | numbers | {"seconds": 60, "shown": 256}
    text = "\n".join(posttraining.main_table(rows))
    assert "| W1A32 | closed form | 90.0 ± 0.0 | 89.5 ± 0.5 | 80.0 ± 0.0 | 0.5 ± 0.5 | 0.7 | met |" in text
    rows = {run: row | {"accuracy": 0.89} for run, row in rows.items()}
    assert "| 1.0 ± 0.0 | 0.7 | **missed** |" in "\n".join(posttraining.main_table(rows))


def test_documents_are_damaged_and_read(script):
    """A few of the cases, with the limits of the benchmark: each ends well, or with an error of proxbit."""
    documents = script("fuzz_documents")
    counts, wrong, memory = documents.fuzz(20, seed=3)
    assert wrong == [] and memory < 2**30 and sum(cells.total() for cells in counts.values()) == 20
    text = documents.page(20, 3, 0.1, (counts, ["case 3: **hang**"], memory))
    assert "- case 3: **hang**" in text and "| **all** | | 20 |" in text


def test_folders_of_pictures_at_random_are_taken_or_refused(script):
    fuzz = script("fuzz_pictures")
    results, memory = fuzz.fuzz(25, 7)
    assert {outcome for _, outcome, _, _ in results} == {fuzz.READ, fuzz.REFUSED} and memory < 400
    page = fuzz.page(results, memory, 7, 0.1)
    assert "| **all** | 25 | " in page and "Nothing else happened." in page


def test_the_fuzzer_of_pictures_sees_what_must_not_happen(script, tmp_path, monkeypatch):
    fuzz = script("fuzz_pictures")
    monkeypatch.setattr(fuzz, "SECONDS", 0.05)
    watch = fuzz.Watch()

    def hang(data):
        while True:
            pass

    for read, expected in (
        (lambda data: 1 / 0, fuzz.TRACEBACK),
        (hang, fuzz.HANG),
        (lambda data: os.system("true"), fuzz.PROGRAM),
    ):
        assert fuzz.outcome_of(tmp_path, read, watch)[0] == expected
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (9, 9)).save(tmp_path / name / "1.png")
    monkeypatch.setattr(fuzz, "SECONDS", 20)
    assert fuzz.outcome_of(tmp_path, fuzz.commands, watch)[0] == fuzz.READ
    found = fuzz.files_of(tmp_path)
    monkeypatch.setattr(fuzz, "files_of", lambda data: found | {"lost.png"})
    assert fuzz.outcome_of(tmp_path, fuzz.commands, watch)[0] == fuzz.LOST


def made_run(models, method, accuracy, fold=0, start="a", column="W1A32"):
    """A run that has been, and its row."""
    run = models.Run("swin", fold, column, method)
    numbers = {"float_accuracy": 0.9, "accuracy": accuracy, "kl": 0.125, "agreement": 0.75, "seconds": 60}
    return run, asdict(run) | numbers | {"start": start}


def test_the_closed_form_is_paired_with_signs_and_training(script, tmp_path, monkeypatch):
    """By fold, and by float start: fold 1 was trained from another one."""
    models = script("posttraining_models")
    monkeypatch.setattr(models, "FOLDER", tmp_path)
    rows = [made_run(models, models.SIGNS, 0.5), made_run(models, models.CLOSED, 0.8)]
    rows += [made_run(models, models.CLOSED, 0.86, 1), made_run(models, models.TRAINED, 0.82)]
    rows += [made_run(models, models.TRAINED, 0.9, 1, "b"), made_run(models, models.CLOSED, 0.7, column="W1A8")]
    page = models.write(dict(rows))
    assert page == (tmp_path / "models.md").read_text()
    means = "90.0 ± 0.0 | 50.0 | 83.0 ± 3.0 | 86.0 ± 4.0"
    assert f"| Swin, solar cells | W1A32 | {means} | 30.0 (1) | 2.0 (1) | met |" in page
    assert "| Swin, solar cells | W1A8 | 90.0 |  | 70.0 |  |  |  |  |" in page
    assert "| W1A32 | 0.1250 | 0.1250 | 0.1250 | 75.0 | 75.0 ± 0.0 | 75.0 ± 0.0 | 60 | 60 |" in page
    missed = models.write(dict([made_run(models, models.CLOSED, 0.8), made_run(models, models.TRAINED, 0.821)]))
    assert "| 2.1 (1) | **missed** |" in missed


def test_models_are_made_1_bit_in_every_way(script, tmp_path, monkeypatch):
    """On two pictures of each digit, for one epoch; what is finished is known again."""
    models = script("posttraining_models")
    train, test = models.accuracy.digits(0)
    few = models.accuracy.Images(train.pixels[:20], train.labels[:20])
    short = {"pictures": lambda fold: (few, test), "float_epochs": 1, "epochs": 1, "batch": 10}
    monkeypatch.setitem(models.MODELS, "digits-32", replace(models.MODELS["digits-32"], **short))
    runs = list(models.wanted(["digits-32"], [0], [models.SIGNS, models.CLOSED, models.TRAINED]))
    assert len(runs) == 9 and [run.method for run in runs[-3:]] == 3 * [models.TRAINED]
    rows = [models.do(run, tmp_path / "cache") for run in runs if run.column != "W1A8"]
    assert len({row["start"] for row in rows}) == 1 and rows[0]["shown"] == 20
    path = tmp_path / "models.jsonl"
    assert models.known(path) == {}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(models.known(path)) == [run for run in runs if run.column != "W1A8"]
    closed = {row["method"]: row["kl"] for row in rows if row["column"] == "W1A32"}
    assert closed[models.CLOSED] < closed[models.SIGNS]


def test_every_model_has_layers_to_make_1_bit(script):
    models = script("posttraining_models")
    for name, task in models.MODELS.items():
        report = proxbit.binarize(task.model()).binarization_report
        assert len(report.converted) > 10, name


# Quantizers of other libraries, and bits of their codes.
PEERS = {
    "HQQ, 1 bit": 1,
    "torchao, int1": 1,
    "onnxsim, BiLLM": 1,
    "optimum-quanto, qint2": 2,
    "HQQ, 2 bits": 2,
    "torchao, int2": 2,
    "optimum-quanto, qint4": 4,
    "HQQ, 4 bits": 4,
    "torchao, int4": 4,
    "onnxruntime, int8 dynamic": 8,
    "onnxruntime, int8 static": 8,
    "NNCF for OpenVINO, int8": 8,
}


@pytest.fixture(scope="module")
def tiny_dinov2():
    """A DINOv2 of one layer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 1, "image_size": 28, "num_labels": 3}
    return Dinov2ForImageClassification(Dinov2Config(**sizes, patch_size=14)).eval()


@pytest.mark.parametrize(("name", "bits"), PEERS.items())
def test_peers_quantize_the_layers(script, tiny_dinov2, name, bits):
    """More bits come nearer to the float model; what they take is at least what the codes do.

    The sums of onnxruntime's 8 bits saturate where a processor has no VNNI: 0.08 there, and 0.05 elsewhere.
    """
    peer = script("model_peers").PEERS[name]
    if peer.versions() is None:
        pytest.skip(f"{name} is not installed")
    layers = list(proxbit.binarize(copy.deepcopy(tiny_dinov2)).binarization_report.converted)
    images = torch.randn(40, 3, 28, 28, generator=torch.manual_seed(1))
    made = peer.make(copy.deepcopy(tiny_dinov2), layers, images)
    with torch.no_grad():
        wanted, found = tiny_dinov2(pixel_values=images).logits, made.model(pixel_values=images)[0]
    error = (found - wanted).norm() / (wanted - wanted.mean(0)).norm()
    eight = 0.08 if torch.backends.cpu.get_cpu_capability() == "AVX2" else 0.05
    assert 0 < error < {1: 3, 2: 2, 4: 0.2, 8: eight}[bits]
    weights = sum(tiny_dinov2.get_submodule(layer).weight.numel() for layer in layers)
    assert bits < 8 * made.packed / weights < bits + 1.5 and made.packed <= made.stored


def test_crops_are_of_one_photograph_each(script):
    """Of one colour each, which normalization keeps apart; the same seed cuts the same."""
    peers = script("posttraining_peers")
    pictures = [np.full(size, color, np.uint8) for size, color in (((40, 60, 3), 0), ((90, 30, 3), 255))]
    found = peers.crops(pictures, 5, seed=3, side=14)
    assert found.shape == (5, 3, 14, 14) and torch.equal(found, peers.crops(pictures, 5, seed=3, side=14))
    for index, color in enumerate((0, 1, 0, 1, 0)):
        expected = [(color - mean) / std for mean, std in zip(peers.dinov2.MEAN, peers.dinov2.STD, strict=True)]
        assert torch.allclose(found[index].mean((1, 2)), torch.tensor(expected), atol=1e-5)


def test_photographs_that_need_no_download(script):
    pytest.importorskip("skimage")
    found = script("posttraining_peers").photographs()
    assert list(found) == sorted(found) and len(found) == 10 and {"astronaut", "china", "rocket"} <= set(found)
    assert all(image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8 for image in found.values())


def test_fidelity_is_of_cls_and_of_patches(script, tiny_dinov2):
    peers = script("posttraining_peers")
    images = torch.randn(3, 3, 28, 28, generator=torch.manual_seed(2))
    wanted = peers.features(tiny_dinov2.dinov2, images)
    assert wanted.shape == (3, 5, 128)
    wanted[:, 0] *= -2
    assert peers.fidelity(tiny_dinov2.dinov2, wanted, images) == pytest.approx({"cls": -1, "patches": 1}, abs=1e-5)


def test_a_model_is_calibrated_beside_its_peers(script, tiny_dinov2, tmp_path):
    """The closed form is nearer than the signs; what is finished, and from this float model, is not done again."""
    peers = script("posttraining_peers")
    model = tiny_dinov2.dinov2
    seen, images = torch.randn(44, 3, 28, 28, generator=torch.manual_seed(3)).split([40, 4])
    wanted = peers.features(model, images)
    subject = peers.Subject(peers.PHOTOGRAPHS, "a", model, seen, lambda each: peers.fidelity(each, wanted, images))
    rows, runs = tmp_path / "peers.jsonl", tmp_path / "runs.jsonl"
    signs, _, closed, _ = peers.OWN
    methods = [peers.FLOAT, signs, closed]
    made = [peers.do(subject, method) for method in methods]
    assert made[0]["cls"] > made[2]["cls"] > made[1]["cls"] and [row["images"] for row in made] == [0, 0, peers.SHOWN]
    assert peers.missing(subject, rows, runs)[:3] == list(peers.METHODS[:3])
    rows.write_text("".join(json.dumps(row) + "\n" for row in made))
    assert not set(methods) & set(peers.missing(subject, rows, runs))
    assert set(methods) <= set(peers.missing(replace(subject, start="b"), rows, runs))
    assert {signs, closed} <= set(peers.missing(replace(subject, name="solar"), rows, runs))


def test_the_page_of_peers_has_our_runs_from_the_same_float_model(script, tmp_path):
    """And says what is not installed, or stopped."""
    peers = script("posttraining_peers")
    _, _, closed, eight = peers.OWN
    numbers = {"float_accuracy": 0.9, "accuracy": 0.85, "balanced": 0.8, "kl": 0.1234, "agreement": 0.75}
    runs, lines = tmp_path / "runs.jsonl", []
    for method, start in ((closed, "a"), (eight, "b")):
        lines.append(json.dumps(asdict(peers.run_of("solar", method)) | numbers | {"start": start}) + "\n")
    runs.write_text("".join(lines))
    sizes = {"start": "a", "images": 0, "packed": 2.5, "stored": 8.25}
    rows = {("solar", name): {"part": "solar"} | sizes | numbers for name in (peers.FLOAT, "torchao, int2")}
    rows["photographs", "torchao, int2"] = {"part": "photographs", "cls": 0.5, "patches": 0.25} | sizes
    gone = {name: replace(peer, packages=("no-such-package",)) for name, peer in peers.PEERS.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "PEERS", gone)
        failed = {("animals", "HQQ, 2 bits"): "ValueError: no"}
        page = peers.write(peers.with_own(rows, runs), failed, tmp_path / "peers.md")
    assert page == (tmp_path / "peers.md").read_text()
    assert "| torchao, int2 | 2.50 | 8.25 |  | 85.0 | 80.0 | 5.0 | 0.1234 | 75.0 |" in page
    assert f"| **{closed}** | 1.06 | 1.06 | 256 | 85.0 | 80.0 | 5.0 | 0.1234 | 75.0 |" in page and eight not in page
    assert "| torchao, int2 | 2.50 | 8.25 |  | 0.5000 | 0.2500 |" in page
    assert "- HQQ, 2 bits: not installed, no row." in page and "- HQQ, 2 bits stopped: `ValueError: no`" in page
