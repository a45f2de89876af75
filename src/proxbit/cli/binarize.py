"""`proxbit binarize`: from a float model to a latent checkpoint, or, with some images, to a packed model."""

import copy
import json
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from proxbit.analysis.timing import time_rounds, torch_threads
from proxbit.cli.checkpoints import check_new_folder, load_model, load_processor, save
from proxbit.cli.images import read_split, tell_images, tell_left_out
from proxbit.cli.progress import watch
from proxbit.config import BinarizationConfig
from proxbit.errors import CheckpointError, ConfigError, DataError
from proxbit.foreign import printable
from proxbit.plugin import binarize as binarize_model
from proxbit.plugin import pack
from proxbit.posttraining import calibration_of
from proxbit.training.calibration import calibrate
from proxbit.training.evaluation import Evaluation, evaluate_images
from proxbit.training.image_folders import Images, LeftOut, load_splits, pick_split, unlabelled
from proxbit.training.recipes import DEFAULT_RECIPE, get_recipe

__all__ = ["binarize"]

HELP = {item.name: item.metadata["help"] for item in fields(BinarizationConfig)}
# What only training makes worth something: around a layer that was not trained with it, it would do harm.
FOR_TRAINING = {"residual": False, "rprelu": False}
HELD_OUT, ROUNDS = ("test", "validation"), 11


ImageFolder = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        help="Images like those that the model will see, in a folder or a dataset on the hub; labels are ignored. "
        "With them the weights are fitted, and OUT is a packed model.",
    ),
]
NumImages = Annotated[
    int | None,
    typer.Option(
        "--num_images",
        metavar="N",
        help="How many images are looked at, drawn at random: 256, or 2048 if activations are signs, by default.",
        show_default=False,
    ),
]
Labels = Annotated[
    bool,
    typer.Option(
        "--labels",
        help="Compare accuracies too: the folder of images has a folder for each class, and a part 'test' or "
        "'validation'.",
    ),
]
RecipeName = Annotated[
    str, typer.Option(metavar="NAME", help="See `proxbit recipes`. Options below take the place of its fields.")
]


def _option(name: str, metavar: str | None = None) -> Any:
    """An option with the help of the field of the configuration that it sets."""
    flag = f"--{name.replace('_', '-')}"
    return typer.Option(flag, help=escape(HELP[name]), metavar=metavar, show_default=False)


def _object(name: str, text: str | None) -> dict[str, Any] | None:
    """A JSON object from the command line."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--{name.replace('_', '-')} must be JSON, not {text!r}: {error}.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"--{name.replace('_', '-')} must be a JSON object, not {text}.")
    return value


def binarize(
    model: Annotated[str, typer.Argument(help="A float model: a folder, or a name on the hub.")],
    out: Annotated[Path | None, typer.Argument(help="A new folder; or --output_dir.", show_default=False)] = None,
    images: ImageFolder = None,
    output_dir: Annotated[Path | None, typer.Option("--output_dir", help="The new folder.")] = None,
    num_images: NumImages = None,
    labels: Labels = False,
    recipe: RecipeName = DEFAULT_RECIPE,
    weights: Annotated[str | None, _option("weights", "NAME")] = None,
    pair_parameters: Annotated[str | None, _option("pair_parameters", "JSON")] = None,
    activations: Annotated[str | None, _option("activations", "NAME")] = None,
    activation_pair: Annotated[str | None, _option("activation_pair", "NAME")] = None,
    rprelu: Annotated[bool, _option("rprelu")] = False,
    residual: Annotated[bool, _option("residual")] = False,
    accumulator_bits: Annotated[int | None, _option("accumulator_bits", "N")] = None,
    accumulator_mode: Annotated[str | None, _option("accumulator_mode", "NAME")] = None,
    overrides: Annotated[str | None, _option("overrides", "JSON")] = None,
    learned_attention: Annotated[list[str] | None, _option("learned_attention", "PATTERN")] = None,
    include: Annotated[list[str] | None, _option("include", "PATTERN")] = None,
    modules_to_not_convert: Annotated[list[str] | None, _option("modules_to_not_convert", "PATTERN")] = None,
    normalize: Annotated[str | None, _option("normalize", "NAME")] = None,
    scale: Annotated[str | None, _option("scale", "NAME")] = None,
    center: Annotated[str | None, _option("center", "NAME")] = None,
) -> None:
    """Make a float model 1-bit from images, or latent for training.

    With --images the model is packed, in minutes and without labels: its weights are fitted, layer by layer, to what
    the float model computes on the images. Residuals and RPReLUs of a recipe, which only training makes worth
    something, are left out then. Without --images the model is as large as before, and simulated; `proxbit train`
    trains it, `proxbit pack` packs it. Objects are given as JSON, lists by repeating the option.

    Example: proxbit binarize google/vit-base-patch16-224 --images photos --output_dir vit-1bit --recipe w1a8

    Example: proxbit binarize google/vit-base-patch16-224 latent --recipe w1a8 --weights parq
    """
    given = {name: value for name, value in locals().items() if name in HELP and value}
    if num_images is not None and num_images < 1:
        raise ConfigError(f"--num_images must be at least 1, not {num_images}.")
    given |= {name: _object(name, given[name]) for name in ("pair_parameters", "overrides") if name in given}
    folder = _folder(out, output_dir)
    if images is None:
        if num_images is not None or labels:
            raise ConfigError("--num_images and --labels are about images: name them, --images FOLDER.")
        config = get_recipe(recipe).binarization(**given)
        check_new_folder(folder)
        save(binarize_model(load_model(model), config), load_processor(model), folder)
        return
    config = get_recipe(recipe).binarization(**(FOR_TRAINING | given))
    check_new_folder(folder)
    from_images(_Source(model, images, num_images, labels, recipe), config, folder)


def _folder(out: Path | None, output_dir: Path | None) -> Path:
    if (out is None) == (output_dir is None):
        raise ConfigError("Where to? Name one new folder: proxbit binarize MODEL --images FOLDER --output_dir OUT.")
    folder = out or output_dir
    assert folder is not None
    return folder


@dataclass(frozen=True)
class _Source:
    """What the command was told."""

    model: str
    images: str
    num_images: int | None
    labels: bool
    recipe: str


def from_images(source: _Source, config: BinarizationConfig, folder: Path) -> None:
    """Fit the weights, pack the model, write it, and show it beside its float form."""
    model, processor = load_model(source.model), load_processor(source.model)
    if processor is None:
        raise CheckpointError(
            f"{source.model!r} has no preprocessor_config.json that can be read: it is not known how images are "
            "prepared."
        )
    test = _labelled(source.images) if source.labels else None
    evaluations = {} if test is None else {"float": _evaluate(model, processor, source.model, test)}
    plain = copy.deepcopy(model)
    left_out: list[LeftOut] = []
    binarize_model(model, config)
    calibrate(model, unlabelled(source.images, 0, left_out), num_images=source.num_images, processor=processor)
    tell_left_out(Console(stderr=True), left_out)
    report = calibration_of(model)
    assert report is not None
    pack(model)
    if test is not None:
        evaluations["packed"] = _evaluate(model, processor, source.model, test)
    metrics = {
        name: {"accuracy": each.accuracy, "balanced_accuracy": each.balanced_accuracy}
        for name, each in evaluations.items()
    }
    run = {
        "recipe": source.recipe,
        "dataset": source.images,
        "steps": 0,
        "train_samples": 0,
        "calibration_samples": report.images,
        "teacher": "none",
        "metrics": metrics or None,
        "eval_samples": evaluations["packed"].pictures if evaluations else None,
    }
    save(model, processor, folder, run)
    Console().print(str(report).splitlines()[0], highlight=False)
    image = next(unlabelled(source.images, 0, []))
    show(plain, model, dict(processor(images=[image], return_tensors="pt")), folder, evaluations)


def _labelled(images: str) -> Images:
    """The part with labels that nothing is fitted to; what it holds is printed."""
    splits = load_splits(images)
    if len(splits) < 2:
        raise DataError(
            f"--labels: {printable(images)} has one part, which the weights are fitted to. Accuracies are of another "
            "one: lay the images out as DATA/train/cat/1.jpg and DATA/test/cat/1.jpg."
        )
    chosen = pick_split(splits, None, HELD_OUT)
    labelled = read_split(images, chosen, splits[chosen])
    tell_images(Console(stderr=True), splits, splits, {chosen: labelled})
    return labelled


def _evaluate(model: Any, processor: Any, name: str, images: Images) -> Evaluation:
    names = model.config.id2label  # which the evaluation replaces by numbers
    try:
        return evaluate_images(model, processor, images, name=repr(name), batch=16, watch=partial(watch, "Classifying"))
    finally:
        model.config.id2label = names


def show(
    plain: nn.Module, packed: nn.Module, inputs: dict[str, Any], folder: Path, evaluations: dict[str, Evaluation]
) -> None:
    """The two forms of the model, in one table."""
    sizes = {
        "float": sum(tensor.nbytes for tensor in plain.state_dict().values()),
        "packed": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    }
    with torch_threads(1), torch.inference_mode():
        timings = time_rounds({"float": partial(plain, **inputs), "packed": partial(packed, **inputs)}, ROUNDS)
    table = Table()
    for column in ("", "float", "1 bit", ""):
        table.add_column(column, justify="right" if column else "left")
    if evaluations:
        for title, name in (("accuracy", "accuracy"), ("balanced accuracy", "balanced_accuracy")):
            before, after = (getattr(evaluations[form], name) for form in ("float", "packed"))
            table.add_row(title, f"{before:.2%}", f"{after:.2%}", f"{100 * (after - before):+.1f} points")
    before, after = sizes["float"], sizes["packed"]
    table.add_row("bytes", f"{before:,}", f"{after:,}", f"{before / after:.1f}x smaller")
    old, new = (1e3 * timings.median(form) for form in ("float", "packed"))
    table.add_row("ms an image, 1 thread", f"{old:.2f}", f"{new:.2f}", f"{old / new:.1f}x as fast")
    console = Console()
    console.print(table)
    if evaluations:
        count = evaluations["packed"].pictures
        console.print(f"Accuracies are of {count:,} images that the weights were not fitted to.", highlight=False)
    console.print(f"Next: proxbit evaluate {folder} DATA; proxbit summary {folder}", highlight=False, soft_wrap=True)
