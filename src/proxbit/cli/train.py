"""`proxbit train`: from a float model and images to a packed classifier."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from functools import partial
from inspect import getdoc
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import typer
import yaml
from accelerate.utils import parse_flag_from_env
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import HfArgumentParser, TrainingArguments, set_seed

from proxbit.analysis.latency import measure_latency
from proxbit.cli.checkpoints import architecture, check_new_folder, load_model, load_processor, save, save_plain
from proxbit.cli.images import read_split, tell_images
from proxbit.config import QUANT_METHOD, stored_kind
from proxbit.errors import CheckpointError, ConfigError, DataError, ModelStateError, ProxbitError
from proxbit.foreign import printable
from proxbit.patching import state_of
from proxbit.plugin import pack
from proxbit.training.arguments import ProxConnectArguments
from proxbit.training.checkpoints import check_start
from proxbit.training.image_folders import IMAGE, LABEL, Images, Splits, class_names, load_splits, pick_split, relabel
from proxbit.training.labels import give_labels, match_labels, numbers_of_labels, some
from proxbit.training.metrics import classification_metrics
from proxbit.training.recipes import DEFAULT_RECIPE
from proxbit.training.trainer import ProxConnectTrainer

__all__ = ["ImageArguments", "parse", "train"]

SETTINGS_FILES = (".yaml", ".yml", ".json")
HELD_OUT = ("validation", "test")
# By which `accelerate launch` says that no process has the whole model.
SPREADING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


@dataclass
class ImageArguments:
    """What is trained, and with which images; each field's `metadata["help"]` says what it is."""

    model: str = field(metadata={"help": "A float or latent image classifier: a folder, or a name on the hub."})
    data: str = field(metadata={"help": "A folder with a folder for each class, or a dataset on the hub."})
    teacher: str | None = field(
        default=None,
        metadata={"help": "A float classifier with the same labels, for distillation."},
    )
    train_split: str | None = field(default=None, metadata={"help": "None: train, or the only one."})
    eval_split: str | None = field(
        default=None, metadata={"help": "None: validation, test, or eval_fraction of the images of train_split."}
    )
    eval_fraction: float = field(
        default=0.1, metadata={"help": "Where there is no split to evaluate with: the share held out, in (0, 1)."}
    )

    def __post_init__(self) -> None:
        if not 0 < self.eval_fraction < 1:
            raise ConfigError(f"eval_fraction must be between 0 and 1, not {self.eval_fraction}.")


class _Parser(HfArgumentParser):
    """HfArgumentParser, whose refusals are those of proxbit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message[:1].upper()}{message[1:]}. See `proxbit train --help`.")


def read_settings(path: Path) -> dict[str, Any]:
    """The fields of a YAML or JSON file.

    Raises:
        ConfigError: if there is no such file, or it is no mapping.
    """
    try:
        found = yaml.safe_load(path.read_text())  # JSON is YAML
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML or JSON: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} must hold fields and their values, such as `learning_rate: 1e-4`.")
    return found


def parse(arguments: list[str]) -> tuple[ImageArguments, ProxConnectArguments]:
    """The fields from a file, if one comes first, and from options, which win.

    Raises:
        ConfigError: for unknown fields, or values that are not valid.
    """
    parser = _Parser((ImageArguments, ProxConnectArguments), allow_abbrev=False, add_help=False)
    if arguments and not arguments[0].startswith("-"):
        _take(parser, read_settings(Path(arguments[0])), arguments[0])
        arguments = arguments[1:]
    for before, each in pairwise(arguments):
        if Path(each).suffix in SETTINGS_FILES and not before.startswith("-") and not each.startswith("-"):
            raise ConfigError(f"A file of settings comes first: `proxbit train {each} ...`.")
    try:
        images, training, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    except ProxbitError:
        raise
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise ConfigError(f"These arguments do not work: {error}") from error
    if unknown:
        raise ConfigError(f"Unknown: {' '.join(unknown)}. See `proxbit train --help`.")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        if getattr(training, name) < 1:
            raise ConfigError(f"{name} must be 1 or more, not {getattr(training, name)}.")
    _settle(training)
    return images, training


def _settle(training: ProxConnectArguments) -> None:
    """Set what follows from the machine, and from what this command trains with."""
    training.remove_unused_columns = False
    if training.device.type == "cpu":  # Pages are pinned for the way to an accelerator.
        training.dataloader_pin_memory = False


def _take(parser: HfArgumentParser, settings: Mapping[str, Any], path: str) -> None:
    """Make the settings of a file the defaults of the options."""
    actions = {action.dest: action for action in parser._actions}
    for name, value in settings.items():
        if name not in actions:
            near = get_close_matches(str(name), actions, n=3)
            hint = f" Did you mean {' or '.join(near)}?" if near else " See `proxbit train --help`."
            raise ConfigError(f"{path}: there is no field {name!r}.{hint}")
        if isinstance(value, list) and actions[name].nargs is None:
            raise ConfigError(f"{path}: {name} takes one value, not {value!r}.")
        actions[name].required = False
        # A number as text goes through the type of its option, as it would on the command line.
        number = isinstance(value, int | float) and not isinstance(value, bool)
        actions[name].default = str(value) if number else value


def pick_splits(splits: Splits, given: ImageArguments) -> tuple[str, str | None]:
    """The names of the split to train with, and of that to evaluate with where there is one."""
    name = pick_split(splits, given.train_split, ["train"])
    held_out = given.eval_split or next((other for other in HELD_OUT if other in splits and other != name), None)
    if held_out is None:
        return name, None
    pick_split(splits, held_out, [])
    train, test = class_names(splits[name]), class_names(splits[held_out])
    if train != test:
        raise DataError(f"The classes of {name} and {held_out} differ: {train} and {test}.")
    return name, held_out


def read_data(splits: Splits, names: tuple[str, str | None], given: ImageArguments, seed: int) -> list[Images]:
    """The images of `pick_splits` to train and to evaluate with, none but such as can be read; what they are is
    printed.
    """
    name, held_out = names
    train = read_split(given.data, name, splits[name])
    if held_out is None:
        title = f"held out, {given.eval_fraction:.0%}"
        parts = train.dataset.train_test_split(test_size=given.eval_fraction, seed=seed)
        test = replace(train, dataset=parts["test"], left_out=())
        train = replace(train, dataset=parts["train"])
    else:
        title, test = held_out, read_split(given.data, held_out, splits[held_out])
        known = train.counts()
        unknown = sorted(label for label, count in test.counts().items() if count and not known[label])
        if unknown:
            raise DataError(
                f"{printable(given.data)}: {held_out} has images of classes that {name} has none of: {some(unknown)}."
            )
    tell_images(Console(stderr=True), splits, [name, held_out or name], {name: train, title: test})
    return [train, test]


def load_for(name: str, names: Sequence[str] | None) -> tuple[nn.Module, dict[int, int]]:
    """The model, and its number of each class: with its own labels if they fit, else with rows for those of the
    images in its head, of which those for labels that it has stay."""
    config, _ = architecture(name)
    if stored_kind(getattr(config, "quantization_config", None), name) == (QUANT_METHOD, "packed"):
        raise ModelStateError(f"{name!r} is packed, and cannot be trained; name its latent checkpoint.")
    label2id = numbers_of_labels(config)
    try:
        numbers = match_labels(names, label2id, repr(name))
    except DataError:
        model: Any = load_model(name)
        kept = give_labels(model, list(names or ()))
        rows = f"the rows of {some(kept)} are kept, the others are new" if kept else "all of its rows are new"
        typer.echo(f"{printable(name)} gets a new head for {len(names or ())} classes: {rows}.", err=True)
        return model, {i: i for i in range(len(names or ()))}
    model = load_model(name)
    model.config.label2id = label2id
    return model, numbers


def prepare(batch: dict[str, Any], processor: Any) -> dict[str, Any]:
    """Images and labels as the model takes them."""
    pixels = processor(batch[IMAGE], return_tensors="pt")["pixel_values"]
    return {"pixel_values": list(pixels), "labels": batch[LABEL]}


def make_trainer(given: ImageArguments, args: ProxConnectArguments) -> ProxConnectTrainer:
    """The Trainer with everything that was asked for, checked; nothing is written yet."""
    out = Path(args.output_dir)
    if args.fsdp or args.deepspeed or any(map(parse_flag_from_env, SPREADING)):
        raise ConfigError(
            "`proxbit train` keeps the whole model in every process (DDP); with FSDP or DeepSpeed, use "
            "ProxConnectTrainer in a script of your own."
        )
    check_start(out, args.resume_from_checkpoint)
    if args.resume_from_checkpoint is None:
        check_new_folder(out)
    architecture(given.model)  # A name that is none is told before images are read.
    splits = load_splits(given.data)
    names = pick_splits(splits, given)
    processor = load_processor(given.model)
    if processor is None:
        raise CheckpointError(
            f"{given.model!r} has no preprocessor_config.json that can be read: how are images prepared for it?"
        )
    set_seed(args.seed)  # of a new head
    model, numbers = load_for(given.model, class_names(splits[names[0]]))
    if state_of(model) == "float" and args.recipe is None:
        args.recipe = DEFAULT_RECIPE
    teacher = None if given.teacher is None else load_model(given.teacher)
    if teacher is not None and numbers_of_labels(teacher.config) != numbers_of_labels(model.config):
        raise ConfigError(f"The labels of the teacher {given.teacher!r} are not those of the model.")
    parts = read_data(splits, names, given, args.seed)
    train_set, test_set = (relabel(each, numbers, repr(given.model)) for each in parts)
    transform = partial(prepare, processor=processor)
    try:
        return ProxConnectTrainer(
            model=model,
            args=args,
            teacher=teacher,
            train_dataset=train_set.with_transform(transform),
            eval_dataset=test_set.with_transform(transform),
            processing_class=processor,
            compute_metrics=classification_metrics,
        )
    except ProxbitError:
        raise
    except (ValueError, ImportError, RuntimeError) as error:  # Such as `report_to` something that is not installed.
        raise ConfigError(f"These arguments do not work: {error}") from error


def train(context: typer.Context) -> None:
    """Train a 1-bit classifier on images, evaluate, pack and save it.

    Example: proxbit train --model google/vit-base-patch16-224 --data photos --output_dir runs/photos

    Example: proxbit train config.yaml --learning_rate 1e-4

    Fields come from options, and from a YAML or JSON file where one is named first; options win. OUTPUT_DIR is new, or
    empty, and gets: latent/ (to train on), packed/ (to ship, with its cards), the numbers in eval_results.json.
    `proxbit report OUTPUT_DIR` makes a page of the run, `proxbit push OUTPUT_DIR/packed REPO` uploads it.
    """
    given, args = parse(context.args)
    trainer = make_trainer(given, args)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    metrics = trainer.evaluate()
    if not trainer.is_world_process_zero():
        return
    out = Path(args.output_dir)
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    model, processor = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
    save_plain(model, processor, out / "latent")
    table = Table(show_header=False)
    for name, value in metrics.items():
        if "accuracy" in name:
            table.add_row(name.removeprefix("eval_").replace("_", " "), f"{value:.2%}")
    Console().print(table)
    run = trainer.run_record() | {"dataset": given.data, "latency": measure_latency(pack(model))}
    if run["split"] is None:
        run["split"] = f"{given.eval_fraction:.0%} of {run['train_split']}, held out"
    save(model, processor, out / "packed", run)


def _fields() -> str:
    """The fields that transformers does not have, a paragraph each."""
    inherited = {item.name for item in fields(TrainingArguments)}
    own = [*fields(ImageArguments), *(item for item in fields(ProxConnectArguments) if item.name not in inherited)]
    lines = [f"--{item.name}: {item.metadata['help']}" for item in own]
    link = "https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments"
    return "\n\n".join([*lines, f"And the fields of transformers.TrainingArguments: {link}"])


train.__doc__ = f"{getdoc(train)}\n\n{_fields()}"
