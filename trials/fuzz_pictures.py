"""Folders of pictures at random: `python trials/fuzz_pictures.py` writes `trials/results/fuzz_pictures.md`.

Layouts, odd names, modes, damaged files, bombs, links, archives and metadata, read by the functions of the commands.
Each folder is read, every file of it taken or listed, or it is refused in one line; nothing else may happen: no
traceback, no hang, no program started, no file lost.
"""

import argparse
import faulthandler
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import numpy as np
import PIL
from PIL import Image
from rich.console import Console

from proxbit.analysis.environment import environment
from proxbit.cli.images import read_split, tell_images
from proxbit.errors import DataError, ProxbitError
from proxbit.training.image_folders import load_splits, read_images, unlabelled
from proxbit.training.layouts import LITTER, METADATA
from proxbit.training.pixels import extensions

RESULTS = Path(__file__).parent / "results" / "fuzz_pictures.md"
SECONDS = 10.0  # a folder that takes longer hangs
READ, REFUSED = "read", "refused in one line"
TRACEBACK, HANG, LOST, PROGRAM = "**traceback**", "**hang**", "**a file lost**", "**program started**"
OUTCOMES = (READ, REFUSED, TRACEBACK, HANG, LOST, PROGRAM)

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F", "LAB", "HSV")
FORMS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "PCX", "TGA", "JPEG2000", "QOI")
CLASSES = ("cat", "dog", "train", "Test", "val", "pass", "photos [2024]", "café", "a*b?", "-x", "None", "1", "..x", "~")
SPLITS = ("train", "Training", "TRAIN", "test", "Testing", "val", "valid", "validation", "dev", "pred")
NAMES = (
    "1",
    "rapid-test-7",
    "a b",
    "né",
    "日本",
    "x\ny",
    "\x1b[2J",
    "\u202egpj",
    "#1",
    "%41",
    "a'b",
    "n" * 200,
    "é\u0301",
)
EXTENSIONS = (".jpg", ".JPG", ".jpeg", ".tif", ".gif", ".webp", ".bmp", "", ".txt", ".heic", ".eps", ".zip", ".ico")
LINKS = ("nowhere", "..", ".", "/dev/zero", "../..", "/etc/hostname")


def pixels(rng: random.Random) -> Image.Image:
    """A tiny picture of any mode."""
    mode, size = rng.choice(MODES), (rng.choice((1, 3, 8, 9)), rng.choice((1, 3, 8, 300)))
    noise = np.frombuffer(rng.randbytes(size[0] * size[1] * 4), np.uint8).reshape(size[1], size[0], 4)
    if mode == "F":
        values = noise[..., 0].astype(np.float32) + rng.choice((0, 0, -9, np.nan, np.inf))
        return Image.fromarray(values / rng.choice((1, 255)))
    if mode == "I":
        return Image.fromarray(noise[..., 0].astype(np.int32) * rng.choice((1, 257, -1)))
    if mode == "I;16":
        return Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    whole = Image.fromarray(noise)
    return whole.convert("RGB").convert(mode) if mode in ("CMYK", "YCbCr", "LAB", "HSV") else whole.convert(mode)


def encoded(rng: random.Random) -> bytes:
    """A whole file of some format, at times with EXIF, one transparent color or several frames."""
    stream, picture, form = io.BytesIO(), pixels(rng), rng.choice(FORMS)
    options: dict[str, Any] = {}
    if rng.random() < 0.2:
        exif = Image.Exif()
        exif[0x0112] = rng.choice((1, 3, 6, 8, 9, 0, "x"))
        options["exif"] = exif
    if rng.random() < 0.2 and form in ("PNG", "GIF"):
        options["transparency"] = rng.choice((0, 7, 65535))
    if rng.random() < 0.1 and form in ("GIF", "TIFF", "WEBP", "PNG"):
        options |= {"save_all": True, "append_images": [picture.copy(), picture.copy()]}
    try:
        picture.save(stream, form, **options)
    except Exception:  # What a format does not hold.
        stream = io.BytesIO()
        picture.convert("RGB").save(stream, "PNG")
    return stream.getvalue()


def bomb(side: int = 13_300) -> bytes:
    """A PNG of a few kB and of 177 million white pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    head = side.to_bytes(4) * 2 + bytes((1, 0, 0, 0, 0))
    body = zlib.compress((b"\0" + b"\xff" * ((side + 7) // 8)) * side)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


BOMB = bomb()


def spoiled(rng: random.Random) -> bytes:
    """A file that was one: cut, with other bytes, longer, or with other sizes in its head."""
    data = bytearray(encoded(rng))
    kind = rng.randrange(5)
    if kind == 0:
        return bytes(data[: rng.randrange(len(data))])
    for _ in range(rng.choice((1, 4, 30))):
        at = rng.randrange(min(len(data), 64) if kind == 1 else len(data))
        data[at] = rng.choice((0, 255, rng.randrange(256)))
    return bytes(data) + rng.randbytes(50) * (kind == 2)


def no_picture(rng: random.Random) -> bytes:
    """Anything else that may be called a picture."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("1.jpg", b"x")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    wmf = b"\xd7\xcd\xc6\x9a" + bytes(40)
    heic = b"\0\0\0\x18ftypheic" + bytes(12)
    return rng.choice((b"", b"text", eps, wmf, heic, stream.getvalue(), b"<svg/>", rng.randbytes(99), b"\0" * 999))


def put(file: Path, rng: random.Random) -> None:
    """Something at this place: mostly a whole picture."""
    chance = rng.random()
    if chance < 0.6:
        file.write_bytes(encoded(rng))
    elif chance < 0.75:
        file.write_bytes(spoiled(rng))
    elif chance < 0.9:
        file.write_bytes(no_picture(rng))
    elif chance < 0.92:
        file.write_bytes(BOMB)
    elif chance < 0.94:
        os.mkfifo(file)
    else:
        file.symlink_to(
            rng.choice(("nowhere", "..", ".", "/dev/zero", "../..", file.name, "/etc/hostname", file.parent))
        )


def named(rng: random.Random) -> str:
    if rng.random() < 0.03:
        return rng.choice((".DS_Store", "._1.jpg", "Thumbs.db", ".hidden.png", "metadata.csv", "readme.md", "x.zip"))
    stem = rng.choice(NAMES) if rng.random() < 0.3 else str(rng.randrange(99))
    ending = ".png" if rng.random() < 0.7 else rng.choice(EXTENSIONS)
    return os.fsdecode(os.fsencode(stem + ending) + b"\xff.png" * (rng.random() < 0.02))


def classes(folder: Path, rng: random.Random, names: list[str]) -> None:
    """Folders of classes, at times empty, deeper, or links."""
    for name in names:
        name = unicodedata.normalize(rng.choice(("NFC", "NFD")), name)
        place = folder / name / rng.choice(("2021", "x/y")) if rng.random() < 0.01 else folder / name
        if rng.random() < 0.02 and not os.path.lexists(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(rng.choice((folder, folder.parent, "nowhere", ".")), target_is_directory=True)
            continue
        place.mkdir(parents=True, exist_ok=True)
        for _ in range(rng.choice((0, *(2, 3, 4) * 6))):
            file = place / named(rng)
            if not os.path.lexists(file):
                put(file, rng)


def metadata(folder: Path, rng: random.Random) -> None:
    """A metadata file about what is there, more or less."""
    files = [str(each.relative_to(folder)) for each in folder.rglob("*") if each.is_file()][:20]
    names = [each for each in files if each.isprintable()]
    names += rng.choice(([], ["../x.png", "/etc/hostname", "no.png", ""]))
    words = rng.choice((["a", "b"], ["0", "1"], ["true", "", "é"], ["1e5", "-1"]))
    labels = [rng.choice(words) for _ in names]
    column = rng.choice(("label", "label", "labels", "place"))
    kind = rng.choice(("csv", "csv", "jsonl", "parquet", "noise"))
    table = datasets.Dataset.from_dict({"file_name": names, column: labels}) if names else None
    name = f"metadata.{rng.choice(('csv', 'jsonl', 'parquet')) if kind == 'noise' else kind}"
    (folder / name).unlink(missing_ok=True)  # It may be a link to a file that is not ours, or a pipe.
    if kind == "noise" or table is None:
        (folder / name).write_bytes(rng.randbytes(80))
    elif kind == "parquet":
        table.to_parquet(folder / name)
    elif kind == "jsonl":
        table.to_json(folder / name)
    else:
        rows = [f'"{name}",{label}' for name, label in zip(names, labels, strict=True)]
        (folder / name).write_text("\n".join([f"file_name,{column}", *rows, *rng.choice(([], ["x", '"']))]))


def make(data: Path, rng: random.Random) -> str:
    """A random folder; the name of its layout."""
    data.mkdir()
    names = rng.sample(CLASSES, rng.choice((1, *(2, 3) * 5)))
    layout = rng.choice(("classes",) * 4 + ("splits",) * 4 + ("metadata",) * 3 + ("flat", "mixed"))
    if layout in ("splits", "mixed"):
        for split in rng.sample(SPLITS, rng.choice((1, 2, 3))):
            (data / split).mkdir(exist_ok=True)
            classes(data / split, rng, names)
    if layout != "splits" and layout != "flat":
        classes(data, rng, names)
    if layout in ("flat", "mixed") or rng.random() < 0.02:
        for _ in range(rng.choice((1, 3))):
            file = data / named(rng)
            if not os.path.lexists(file):
                put(file, rng)
    if layout == "metadata" or rng.random() < 0.05:
        metadata(rng.choice([data, *(each for each in data.iterdir() if each.is_dir() and not each.is_symlink())]), rng)
    return layout


class Lost(Exception):
    """A file that is neither taken nor listed."""


def files_of(data: Path) -> set[str]:
    """All that must be taken or listed: files, and links, but for litter and metadata files, which may be used."""
    found = set()
    for place, folders, files in os.walk(data):
        folders[:] = [each for each in folders if not (each.startswith(".") or each.casefold() in LITTER)]
        names = [each for each in files if not (each.startswith(".") or each.casefold() in (LITTER | set(METADATA)))]
        found |= {os.path.join(place, each).encode("utf-8", "backslashreplace").decode() for each in names}
    return found


def commands(data: Path) -> int:
    """What `train`, `evaluate` and `binarize` do with a folder; how many pictures were taken."""
    splits = load_splits(str(data))
    told = {each.picture for each in splits.left_out}
    taken = 0
    for name, split in splits.items():
        told |= {each["path"] for each in split.cast_column("image", datasets.Image(decode=False))["image"]}
        try:
            pictures = read_images(split)
        except DataError as error:  # None can be read.
            assert str(error).isprintable()
            continue
        if len(pictures.dataset) + len(pictures.left_out) != len(split):
            raise Lost(f"{len(split)} files, {len(pictures.dataset)} taken, {len(pictures.left_out)} listed")
        taken += sum(each.mode == "RGB" for each in pictures.dataset["image"])
        output = io.StringIO()
        tell_images(Console(file=output, width=80), splits, [name], {name: pictures})
        assert output.getvalue().replace("\n", "").isprintable(), "control characters on the terminal"
    missing = files_of(data) - {each.encode("utf-8", "backslashreplace").decode() for each in told}
    if missing:
        raise Lost(str(sorted(missing)[:2]))
    for _ in islice(unlabelled(str(data), 0, []), 4):
        pass
    for name, split in splits.items():
        read_split(str(data), name, split)
    return taken


class Watch:
    """Whether the process starts a program, as Python's audit events tell."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
            self.seen.append(f"{event} {arguments!r}"[:100])


def outcome_of(data: Path, read: Callable[[Path], int], watch: Watch) -> tuple[str, int, str]:
    """The outcome of one folder, how many pictures were taken, and what there is to say of it."""

    def stop(*_: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    faulthandler.dump_traceback_later(3 * SECONDS + 10, exit=True)  # of what no signal interrupts
    watch.seen.clear()
    taken, outcome, why = 0, READ, ""
    try:
        taken = read(data)
    except ProxbitError as error:
        outcome, why = (REFUSED if str(error).isprintable() else TRACEBACK), str(error)
    except TimeoutError:
        outcome, why = HANG, f"more than {SECONDS:.0f} s"
    except Lost as error:
        outcome, why = LOST, str(error)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        outcome, why = TRACEBACK, f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
    return (PROGRAM, taken, str(watch.seen)) if watch.seen else (outcome, taken, why)


def memory(field: str) -> float:
    """VmRSS, what the process has, or VmHWM, the most that it has had; in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


TEXT = """\
# Folders of pictures, at random

`python trials/fuzz_pictures.py --count {count} --seed {seed}`, Pillow {pillow}, {minutes:.1f} minutes on {machine}.

Folders of tiny pictures: classes and splits, with names that look like those of others, in NFC and NFD, with control
characters, and not UTF-8; pictures of {modes} modes in {forms} formats, whole, damaged, and of 177 million pixels in
some kB; EPS, archives, pipes, devices, and links to nowhere, back, and to themselves; metadata files of all kinds.
`load_splits`, `read_images`, `unlabelled`, `read_split` and what the commands print read each of them. "Read" are
folders that can be trained with; the others are refused for their layout, or for a class without a picture that can be
read. Of every folder whose layout is not refused, each file is taken or listed, or else lost. More than
{seconds:.0f} s are a hang.

{table}

{taken:,} pictures were taken in folders that were read. The process had {used:.0f} MB at most more than after its
imports.

{rest}
"""


def fuzz(count: int, seed: int) -> tuple[list[tuple[str, str, int, str]], float]:
    """Layout, outcome, pictures and remarks of each folder; and the megabytes that reading took at most."""
    extensions()  # Which formats there are is found out once.
    datasets.disable_progress_bars()
    watch, results = Watch(), []
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # The most begins anew.
    with tempfile.TemporaryDirectory() as place:
        for case in range(count):
            data = Path(place) / str(case) / "data"
            data.parent.mkdir()
            layout = make(data, random.Random(f"{seed}-{case}"))
            results.append((layout, *outcome_of(data, commands, watch)))
            shutil.rmtree(data.parent)
    return results, memory("VmHWM") - before


def page(results: list[tuple[str, str, int, str]], used: float, seed: int, minutes: float) -> str:
    counts = Counter((layout, outcome) for layout, outcome, _, _ in results)
    lines = ["| layout | folders | " + " | ".join(OUTCOMES) + " |", "|---|" + "---:|" * (len(OUTCOMES) + 1)]
    for layout in (*sorted({layout for layout, *_ in results}), "**all**"):
        cells = [
            sum(n for (each, o), n in counts.items() if o == out and layout in (each, "**all**")) for out in OUTCOMES
        ]
        lines.append(f"| {layout} | {sum(cells)} | {' | '.join(str(cell or '') for cell in cells)} |")
    bad = [f"- {outcome}: `{ascii(why)}`" for _, outcome, _, why in results if outcome not in (READ, REFUSED)]
    return TEXT.format(
        count=len(results),
        seed=seed,
        pillow=PIL.__version__,
        minutes=minutes,
        machine=environment().cpu,
        modes=len(MODES),
        forms=len(FORMS),
        seconds=SECONDS,
        table="\n".join(lines),
        taken=sum(taken for _, _, taken, _ in results),
        used=used,
        rest="\n".join(bad) or "Nothing else happened.",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    start = time.monotonic()
    results, used = fuzz(arguments.count, arguments.seed)
    arguments.out.write_text(page(results, used, arguments.seed, (time.monotonic() - start) / 60))
    print(arguments.out.read_text())


if __name__ == "__main__":
    main()
