"""Folders of real pictures as users have them, one folder a class, and a tiny classifier of those classes."""

from pathlib import Path

import transformers as hf
from PIL import Image

from tiny_models import SIDE, vit

CLASSES = ["temple", "flower"]
READABLE, UNREADABLE = 8, ("cut.jpg", "text.jpg")


def pieces(photographs, which: int, count: int) -> list[Image.Image]:
    """Cut-outs of one photograph, each of another odd size."""
    sizes = [(41, 33), (17, 90), (64, 21), (101, 77)]
    made = []
    for i in range(count):
        width, height = sizes[i % len(sizes)]
        top, left = 37 * i, 53 * i
        made.append(Image.fromarray(photographs[which][top : top + height, left : left + width]))
    return made


def odd_folder(folder: Path, photographs) -> Path:
    """JPEGs in colors, in grey, in CMYK, and turned by EXIF, four a class; and one cut off, and one that is text."""
    for which, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        color, grey, cmyk, turned = pieces(photographs, which, 4)
        exif = Image.Exif()
        exif[0x0112] = 6
        color.save(folder / name / "color.jpg")
        grey.convert("L").save(folder / name / "grey.jpg")
        cmyk.convert("CMYK").save(folder / name / "cmyk.jpg")
        turned.save(folder / name / "turned.jpg", exif=exif)
    whole = (folder / "temple" / "color.jpg").read_bytes()
    (folder / "temple" / "cut.jpg").write_bytes(whole[: 9 * len(whole) // 10])
    (folder / "flower" / "text.jpg").write_text("no picture at all")
    return folder


def tiny_classifier(folder: Path, names=("flower", "other", "temple")) -> Path:
    """A float ViT with random weights, and its image processor."""
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    hf.ViTForImageClassification(vit(**labels)).save_pretrained(folder)
    hf.ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder
