"""Damaged documents: `python trials/fuzz_documents.py` writes `trials/results/fuzz_documents.md`.

Run logs, quantization cards, `config.json` and `preprocessor_config.json` are changed at random and read by `report`,
`card`, `summary`, `push` (up to the upload) and `evaluate` (up to the pictures). Each case ends well, or with one line
of an error of proxbit; nothing else may happen.
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from fuzz_mutations import STRANGE
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.utils import logging

import proxbit
from proxbit.analysis.environment import environment
from proxbit.analysis.report import write_report
from proxbit.analysis.run_log import RUN_LOG
from proxbit.checkpoint.files import CARD_NAME
from proxbit.cli.card import card
from proxbit.cli.checkpoints import load_model, load_processor
from proxbit.cli.summary import summary
from proxbit.errors import ProxbitError
from proxbit.hub.push import prepare_upload
from proxbit.hub.release import write_release

RESULTS = Path(__file__).parent / "results" / "fuzz_documents.md"
SECONDS = 10  # a case that computes for longer hangs
MEMORY = 2 << 30  # bytes of address space beyond what the process starts with
FINE, REFUSED, TRACEBACK, HANG = "fine", "refused", "**traceback**", "**hang**"
COLUMNS = (FINE, REFUSED, TRACEBACK, HANG)
TEXTS = ("\ud800", "\x1b[2J", "a\nb", "x" * 10**5, "[/]", "../" * 9, "NaN", "9" * 5000)
NUMBERS = (10**9, 10**18, 2**63, 10**30, -1, 0, 1e308, -1e308, 1e-320)
DEPTH, LONGEST = 10**5, 2 * 10**6


class Slow(BaseException):
    """A case has taken its time."""


def push(folder: Path) -> None:
    with prepare_upload(folder, "me/x"):
        pass


def evaluate(folder: Path) -> None:
    load_model(str(folder))
    load_processor(str(folder))


# What is damaged, and the commands that read it.
READERS: dict[str, dict[str, Callable[[Path], Any]]] = {
    RUN_LOG: {"report": write_report},
    CARD_NAME: {
        "report": write_report,
        "card": lambda folder: card(str(folder)),
        "summary": lambda folder: summary(str(folder)),
        "push": push,
    },
    "config.json": {"summary": lambda folder: summary(str(folder)), "push": push, "evaluate": evaluate},
    "preprocessor_config.json": {"evaluate": evaluate, "push": push},
}


def original(folder: Path) -> Path:
    """A release in the folder of the run that made it."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=20, intermediate_size=28, num_attention_heads=2, num_hidden_layers=1)
    model = proxbit.binarize(
        ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes)),
        proxbit.BinarizationConfig(include=["vit.layers.*"], overrides={"*.fc2": {"activations": "int8"}}),
    )
    data = [{"pixel_values": torch.randn(3, 8, 8), "labels": i % 3} for i in range(8)]
    args = proxbit.ProxConnectArguments(
        str(folder / "run"), max_steps=4, logging_steps=1, eval_strategy="steps", eval_steps=2, report_to="none",
        use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = proxbit.ProxConnectTrainer(model=model, args=args, train_dataset=data, eval_dataset=data)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    release = write_release(proxbit.pack(model), folder / "release", processing_class=processor)
    shutil.copy(folder / "run" / RUN_LOG, release)
    return release


def places(value: Any) -> list[tuple[Any, Any]]:
    """All places in a document: a list or table, and the index or key in it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, each in items for place in ((value, key), *places(each))]


def change(value: Any, rng: random.Random) -> None:
    """Put something else into one place of a document, or more often than once, or nothing."""
    owner, key = rng.choice(places(value) or [([0], 0)])
    choice = rng.randrange(5)
    if choice == 0:
        del owner[key]
    elif choice == 1:
        other, there = rng.choice(places(value) or [([0], 0)])
        owner[key] = json.loads(json.dumps(other[there]))
    elif choice == 2 and isinstance(owner, dict):
        owner[rng.choice(TEXTS)] = owner.pop(key)
    elif choice == 3:
        text = json.dumps(owner[key])
        owner[key] = [json.loads(text) for _ in range(min(rng.choice([0, 2, 1000, 30_000]), LONGEST // len(text)))]
    else:
        owner[key] = rng.choice([*STRANGE, *TEXTS, *NUMBERS])


def spoil_text(text: bytes, rng: random.Random) -> bytes:
    """Change the bytes of a document, whatever they mean."""
    content = bytearray(text)
    where = rng.randrange(len(content))
    choice = rng.randrange(6)
    if choice == 0:
        content[where] = rng.randrange(256)
    elif choice == 1:
        del content[where:]
    elif choice == 2:
        content[where:where] = rng.choice([b"\0" * 99, b"\xff", b"\n", b"9" * 5000, b"[" * DEPTH, b'{"a":' * DEPTH])
    elif choice == 3:
        content = bytearray(rng.choice([b"", b"null", b"[]", b"3", b'"x"', b"{}", b"[" * DEPTH, b"1e999", b"\xff\xfe"]))
    elif choice == 4:
        content = content.replace(
            *rng.choice([(b"1", b"1e400"), (b"true", b"NaN"), (b"0.", b"-Infinity, 0."), (b",", b"")])
        )
    else:
        content += content[where:]
    return bytes(content)


def spoil(file: Path, rng: random.Random) -> None:
    text = file.read_bytes()
    if rng.randrange(3) == 0:
        file.write_bytes(spoil_text(text, rng))
        return
    lines = file.suffix == ".jsonl"
    documents = [json.loads(part) for part in (text.splitlines() if lines else [text])]
    for _ in range(rng.randint(1, 3)):
        change(rng.choice(documents), rng)
    file.write_text("\n".join(map(json.dumps, documents)) + "\n")


def stop(*_: Any) -> None:
    raise Slow


def read(command: Callable[[Path], Any], folder: Path) -> tuple[str, str]:
    """How a command ends, and where it failed if it did."""
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            command(folder)
    except Slow as error:
        return HANG, where(error)
    except ProxbitError as error:
        return REFUSED, str(error)
    except Exception as error:
        return TRACEBACK, f"{type(error).__name__} in {where(error)}: {str(error)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return FINE, ""


def where(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.name}"


def fuzz(count: int, seed: int) -> tuple[dict[tuple[str, str], Counter[str]], list[str], int]:
    """Counts by document and command, what went wrong, and the most memory beyond that of the beginning."""
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    wrong: list[str] = []
    pairs = [(document, name) for document, readers in READERS.items() for name in readers]
    with tempfile.TemporaryDirectory() as place:
        release = original(Path(place))
        for document, name in pairs:  # A first time, so that what is imported late is imported.
            outcome, why = read(READERS[document][name], release)
            assert outcome == FINE, why
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limits = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, limits[1]))
        handler = signal.signal(signal.SIGVTALRM, stop)
        try:
            for case in range(count):
                document, name = pairs[case % len(pairs)]
                folder = Path(place) / "case"
                shutil.copytree(release, folder)
                spoil(folder / document, random.Random(f"{seed}-{case}"))
                outcome, why = read(READERS[document][name], folder)
                counts[document, name][outcome] += 1
                if outcome in (TRACEBACK, HANG):
                    wrong.append(f"case {case}, {document}, {name}: {outcome} {why}")
                shutil.rmtree(folder)
        finally:
            signal.signal(signal.SIGVTALRM, handler)
            resource.setrlimit(resource.RLIMIT_AS, limits)
    return counts, wrong, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


TEXT = """\
# Damaged documents

`python trials/fuzz_documents.py --count {count} --seed {seed}`, {versions}, {minutes:.1f} minutes on {machine}.

A run log, a quantization card, a `config.json` or a `preprocessor_config.json` is changed at random and read by a
command, `push` up to the upload and `evaluate` up to the pictures. "Refused" is an error of proxbit, which the command
line prints as one line; a case that computes for more than {seconds} s hangs.

{table}

At most {memory:,.0f} MB of memory beyond what undamaged documents take.

{wrong}
"""


def page(
    count: int, seed: int, minutes: float, found: tuple[dict[tuple[str, str], Counter[str]], list[str], int]
) -> str:
    counts, wrong, memory = found
    lines = [f"| document | command | cases | {' | '.join(COLUMNS)} |", "|---|---|" + "---:|" * (len(COLUMNS) + 1)]
    for (document, name), cells in counts.items():
        row = " | ".join(str(cells[column] or "") for column in COLUMNS)
        lines.append(f"| `{document}` | {name} | {cells.total()} | {row} |")
    total = sum(counts.values(), Counter())
    lines.append(f"| **all** | | {total.total()} | {' | '.join(str(total[column]) for column in COLUMNS)} |")
    return TEXT.format(
        count=count,
        seed=seed,
        minutes=minutes,
        seconds=SECONDS,
        memory=memory / 2**20,
        machine=environment().cpu,
        versions=f"torch {torch.__version__}, transformers {transformers.__version__}",
        table="\n".join(lines),
        wrong="\n".join(f"- {each}" for each in wrong) if wrong else "No tracebacks, no hangs.",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.set_verbosity(logging.CRITICAL + 1)
    logging.disable_progress_bar()
    start = time.monotonic()
    found = fuzz(arguments.count, arguments.seed)
    arguments.out.write_text(page(arguments.count, arguments.seed, (time.monotonic() - start) / 60, found))
    print(arguments.out.read_text())


if __name__ == "__main__":
    main()
