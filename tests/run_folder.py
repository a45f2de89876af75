"""The output folder of a run that never was: the numbers are made up, the files are those of a real one."""

import base64
import io

import numpy as np
from PIL import Image

from proxbit.analysis.run_log import append_event, start_log

# What a user may call a class, or a folder.
NAME = "<img src=x onerror=\"boom()\"> & 'co'"
RUN = {
    "model": "ViTForImageClassification",
    "steps": 40,
    "epochs": 4,
    "layers": [
        {"name": "vit.layers.0.mlp.fc1", "kind": "BinaryLinear", "shape": [50, 36], "pair": "bnn++"},
        {"name": f"vit.layers.0.{NAME}", "kind": "BinaryConv2d", "shape": [12, 3, 4, 4], "pair": "bnn++"},
    ],
    "edges": [-3.0, 3.0, 41],
    "binary_parameters": 2376,
    "float_parameters": 264,
    "latent_bytes": 12345,
    "packed_bytes": 2345,
    "settings": {"learning_rate": 0.001, "recipe": NAME},
    "environment": f"a machine, {NAME}",
}


def png(side=8, seed=0):
    """A small picture of noise, as base64."""
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def snapshot(step, flips):
    spread = np.random.default_rng(step).normal(size=(2, 2000))
    edges = [-np.inf, *np.linspace(-3, 3, 42), np.inf]
    latents = [np.histogram(row, edges)[0].tolist() for row in spread]
    return {"event": "layers", "step": step, "epoch": step / 10, "flip_ratio": flips, "latents": latents}


def write_run(folder, steps=40):
    """A run of two layers, with logs every ten steps, until it has done `steps`."""
    start_log(folder, RUN)
    append_event(folder, snapshot(0, None))
    for step in range(10, steps + 1, 10):
        gap, at = 0.5 - step / 80, {"event": "log", "step": step, "epoch": step / 10}
        values = {
            "mu": 0.3 * 10 ** (step / 20),
            "flip_ratio": 1 / step,
            "hardening_gap": gap,
            "learning_rate": 1 / step,
        }
        append_event(folder, at | {"loss": 2 / step, "hard": step == 40, **values})
        append_event(folder, snapshot(step, [1 / step, 0.0]))
        metrics = {"eval_loss": 3 / step, "eval_soft_loss": 2 / step, "eval_accuracy": step / 50}
        append_event(folder, at | metrics | {"eval_soft_accuracy": 0.9, "eval_gap_accuracy": 0.1, "eval_runtime": 1.0})
    pictures = [
        {"png": png(8, 1), "label": NAME, "prediction": "cat", "probability": 0.9, "of_label": 0.05, "right": False},
        {"png": png(64, 2), "label": "cat", "prediction": "cat", "probability": 0.8, "of_label": 0.8, "right": True},
    ]
    append_event(
        folder,
        {"event": "predictions", "step": steps, "epoch": steps / 10, "total": 7, "right": 6, "pictures": pictures},
    )
    return folder
