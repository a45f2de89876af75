"""What commands say of the images that they read: how many there are of each class, and what was left out."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from datasets import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text

from proxbit.cli.progress import watch
from proxbit.foreign import printable
from proxbit.training.image_folders import Images, LeftOut, Splits, check_classes, read_images

__all__ = ["read_split", "tell_images", "tell_left_out"]

MOST_CLASSES, MOST_FILES = 20, 20


def read_split(data: str, split: str, dataset: Dataset) -> Images:
    """The images of one split, with a bar; refused where no classifier can be trained or measured with them."""
    images = read_images(dataset, lambda items, total: watch("Reading images", items, total))
    check_classes(images, f"{data}, {split}")
    return images


def tell_images(console: Console, splits: Splits, read: Iterable[str], parts: Mapping[str, Images]) -> None:
    """Print how many images each part and class has, and all that was left out.

    Args:
        console: to print on.
        splits: the whole set.
        read: the splits of it that were read.
        parts: by their title, what came of them.
    """
    counts = {title: images.counts() for title, images in parts.items()}
    names = list(dict.fromkeys(name for each in counts.values() for name in each))
    table = Table()
    table.add_column("images")
    for title in counts:
        table.add_column(Text(printable(title)), justify="right")
    shown = names if len(names) <= MOST_CLASSES else names[: MOST_CLASSES - 1]
    for name in shown:
        table.add_row(Text(printable(name, most=60)), *(f"{each[name]:,}" for each in counts.values()))
    rest = names[len(shown) :]
    if rest:
        table.add_row(f"{len(rest)} other classes", *(_range(each, rest) for each in counts.values()))
    table.add_section()
    table.add_row("all", *(f"{each.total():,}" for each in counts.values()))
    console.print(table)
    unused = [f"{name} ({len(each):,} files)" for name, each in splits.items() if name not in set(read)]
    if unused:
        console.print(f"not used: {printable(', '.join(unused))}", highlight=False, markup=False, soft_wrap=True)
    left_out = [*splits.left_out, *(each for images in parts.values() for each in images.left_out)]
    tell_left_out(console, left_out, splits.litter)


def _range(counts: Counter[str], names: Sequence[str]) -> str:
    least, most = min(counts[name] for name in names), max(counts[name] for name in names)
    return f"{least:,} each" if least == most else f"{least:,} to {most:,} each"


def tell_left_out(console: Console, left_out: Sequence[LeftOut], litter: int = 0) -> None:
    """Print which files were left out, and why: of each reason some, and the number of all."""
    by_reason: dict[str, list[str]] = {}
    for each in left_out:
        by_reason.setdefault(each.reason, []).append(each.picture)
    if left_out:
        console.print(f"{len(left_out):,} left out:", highlight=False)
    for reason, files in by_reason.items():
        lines = [f"{printable(file, most=4096)}: {printable(reason)}" for file in files[:MOST_FILES]]
        if len(files) > MOST_FILES:
            lines.append(f"... and {len(files) - MOST_FILES:,} more: {printable(reason)}")
        for line in lines:
            console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    if litter:
        console.print(f"passed over: {litter:,} hidden files and files of the system", highlight=False)
