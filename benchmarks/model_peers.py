"""The linear layers of a model quantized after training by every library that is installed: PEERS.

Each is given the layers' names and, where it looks at any, the same images. It has its own defaults for the rest, but
where others did better on the first 128 test images of the solar cells: torchao has groups and a zero point, HQQ axis
0. What is not installed is left out. Versions that this was written with, beside the extra `benchmarks`:

    pip install onnxscript onnxsim==0.8.1 optimum-quanto==0.2.7 hqq==0.2.8.post1 openvino==2026.4.1 nncf==3.4.0

NNCF tells its makers over the network that it was used, unless the variable NNCF_CI is set.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from torch import Tensor, nn
from transformers.utils import ModelOutput

BATCH, GROUP = 32, 64


@dataclass(frozen=True)
class Made:
    """A quantized model.

    Attributes:
        model: answers to `pixel_values` with a ModelOutput whose first entry is that of the float model.
        packed: bytes of codes, scales and zero points of the layers' weights, each code with as few bits as it needs.
        stored: bytes that the library stores for them.
    """

    model: nn.Module
    packed: float
    stored: float


@dataclass(frozen=True)
class Peer:
    """A way of another library.

    Attributes:
        packages: that must be installed.
        make: quantizes the layers of a model, which is changed, and looks at images if `sees`.
        sees: whether it needs images.
    """

    packages: tuple[str, ...]
    make: Callable[[nn.Module, Sequence[str], Tensor], Made]
    sees: bool = False

    def versions(self) -> dict[str, str] | None:
        """Of its packages; None if one is missing."""
        with suppress(PackageNotFoundError):
            return {package: version(package) for package in self.packages}
        return None


def replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of another one."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def quanto(model: nn.Module, names: Sequence[str], images: Tensor, *, bits: int) -> Made:
    """optimum-quanto, weights only; one scale and one shift for 128 weights."""
    library = import_module("optimum.quanto")

    library.quantize(model, weights=getattr(library, f"qint{bits}"), include=list(names))
    library.freeze(model)
    states = [model.get_submodule(name).state_dict() for name in names]
    stored = sum(tensor.nbytes for state in states for key, tensor in state.items() if key.startswith("weight."))
    return Made(model, stored, stored)


def torchao(model: nn.Module, names: Sequence[str], images: Tensor, *, bits: int) -> Made:
    """torchao, weights only: asymmetric, one scale and one zero point for 64 weights. Every code takes a byte."""
    library = import_module("torchao.quantization")

    groups, kind = library.PerGroup(GROUP), library.MappingType.ASYMMETRIC
    config = library.IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), groups, kind)
    library.quantize_(model, config, lambda module, name: name in names)
    weights: list[Any] = [model.get_submodule(name).weight for name in names]
    stored = sum(getattr(weight, key).nbytes for weight in weights for key in weight.tensor_data_names)
    return Made(model, stored - sum(weight.numel() for weight in weights) * (8 - bits) / 8, stored)


def hqq(model: nn.Module, names: Sequence[str], images: Tensor, *, bits: int) -> Made:
    """HQQ, weights only; one scale and one zero point for 64 weights."""
    library = import_module("hqq.core.quantize")
    config = library.BaseQuantizeConfig(nbits=bits, group_size=GROUP, axis=0)
    stored = 0
    for name in names:
        layer = library.HQQLinear(model.get_submodule(name), config, compute_dtype=torch.float32, device="cpu")
        stored += layer.W_q.nbytes + layer.meta["scale"].nbytes + layer.meta["zero"].nbytes
        replace(model, name, layer)
    return Made(model, stored, stored)


class Answers(nn.Module):
    """A model that returns one tensor, for ONNX."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values)[0]


class Session(nn.Module):
    """A runtime's function of images as a model."""

    def __init__(self, run: Callable[[np.ndarray], np.ndarray]) -> None:
        super().__init__()
        self.run = run

    def forward(self, pixel_values: Tensor) -> ModelOutput:
        return ModelOutput(logits=torch.from_numpy(self.run(pixel_values.numpy())))


def export(model: nn.Module, names: Sequence[str], images: Tensor) -> tuple[onnx.ModelProto, list[onnx.NodeProto]]:
    """The model for ONNX, and the products of the layers in it."""
    program = torch.onnx.export(
        Answers(model).eval(),
        (images[:2],),
        dynamo=True,
        verbose=False,
        input_names=["pixel_values"],
        output_names=["answers"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    assert program is not None
    graph = program.model_proto
    constants = {each.name for each in graph.graph.initializer}
    products = [node for node in graph.graph.node if node.op_type == "MatMul" and node.input[1] in constants]
    assert len(products) == len(names), f"{len(products)} products for {len(names)} layers"
    return graph, products


def session(model: onnx.ModelProto | Path) -> Session:
    """onnxruntime on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    runner = onnxruntime.InferenceSession(source, options, ["CPUExecutionProvider"])
    return Session(lambda numbers: runner.run(None, {"pixel_values": numbers})[0])


class Batches(CalibrationDataReader):
    """Images for onnxruntime."""

    def __init__(self, images: Tensor) -> None:
        self.parts = iter(images.split(BATCH))

    def get_next(self) -> dict[str, np.ndarray] | None:
        part = next(self.parts, None)
        return None if part is None else {"pixel_values": part.numpy()}


def onnx_int8(model: nn.Module, names: Sequence[str], images: Tensor, *, static: bool) -> Made:
    """onnxruntime: int8 weights, a scale for every output; int8 inputs, scaled at run time or from the images."""
    graph, products = export(model, names, images)
    chosen = {"nodes_to_quantize": [node.name for node in products], "per_channel": True}
    logging.disable(logging.WARNING)  # It advises steps for whole networks.
    with TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        if static:
            kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
            quantize_static(graph, path, Batches(images), QuantFormat.QDQ, **kinds, **chosen)
        else:
            quantize_dynamic(graph, path, weight_type=QuantType.QInt8, **chosen)
        logging.disable(logging.NOTSET)
        weights = tuple(f"{node.input[1]}_" for node in products)
        sizes = [
            numpy_helper.to_array(each).nbytes
            for each in onnx.load(path).graph.initializer
            if each.name.startswith(weights)
        ]
        return Made(session(path), sum(sizes), sum(sizes))


def billm(model: nn.Module, names: Sequence[str], images: Tensor) -> Made:
    """BiLLM as onnxsim has it: signs, a second sign where a column matters, errors carried on; no split of the rest.

    Floats are multiplied, and every sign takes a byte. Packed, a weight takes one bit, and those of the columns with a
    second sign two.
    """
    graph, products = export(model, names, images)
    # It takes every product with a constant, and no names to leave out: the head's constant is hidden from it.
    for node in [each for each in graph.graph.node if each.op_type == "Gemm"]:
        place, hidden = list(graph.graph.node).index(node), f"{node.input[1]}_hidden"
        graph.graph.node.insert(place, onnx.helper.make_node("Identity", [node.input[1]], [hidden]))
        graph.graph.node[place + 1].input[1] = hidden
    seen = [{"pixel_values": part.numpy()} for part in images.split(BATCH)]
    made = import_module("onnxsim").quantize_weight_only_billm(graph, seen)
    found = {each.name: numpy_helper.to_array(each) for each in made.graph.initializer if "_billm_" in each.name}
    signs = [array for name, array in found.items() if name.endswith("_code1")]
    assert len(signs) == len(names), f"{len(signs)} of {len(names)} layers"
    scales = sum(array.nbytes for name, array in found.items() if "_scale" in name)
    second = sum(array.any(axis=1).sum() * array.shape[1] for name, array in found.items() if name.endswith("_code2"))
    packed = scales + (sum(array.size for array in signs) + second) / 8
    return Made(session(made), float(packed), sum(array.nbytes for array in found.values()))


def openvino_int8(model: nn.Module, names: Sequence[str], images: Tensor) -> Made:
    """NNCF for OpenVINO: int8 weights and inputs from the images, with its settings for transformers (SmoothQuant)."""
    nncf, openvino = import_module("nncf"), import_module("openvino")
    graph, products = export(model, names, images)
    with TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        onnx.save(graph, path)
        network = openvino.Core().read_model(path)
    wanted, fixed = {node.name for node in products}, ("Parameter", "Result", "Constant")
    operations = {each.get_friendly_name(): each.get_type_name() for each in network.get_ops()}
    others = [name for name, kind in operations.items() if name not in wanted and kind not in fixed]
    nncf.set_log_level(logging.ERROR)
    made = nncf.quantize(
        network,
        nncf.Dataset([part.numpy() for part in images.split(BATCH)]),
        subset_size=-(-len(images) // BATCH),
        model_type=nncf.ModelType.TRANSFORMER,
        ignored_scope=nncf.IgnoredScope(names=others),
    )
    constants = [each for each in made.get_ops() if each.get_type_name() == "Constant"]
    codes = [each for each in constants if each.get_element_type().size == 1 and len(each.get_output_shape(0)) == 2]
    assert len(codes) == len(names), f"{len(codes)} of {len(names)} layers"
    scales = sum(model.get_submodule(name).out_features for name in names)
    stored = sum(each.data.size for each in codes) + 4 * scales
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.compile_model(made, "CPU", settings)
    return Made(Session(lambda numbers: compiled(numbers)[0]), stored, stored)


QUANTO, TORCHAO, HQQ = ("optimum-quanto",), ("torchao",), ("hqq",)
PEERS: dict[str, Peer] = {
    "HQQ, 1 bit": Peer(HQQ, partial(hqq, bits=1)),
    "torchao, int1": Peer(TORCHAO, partial(torchao, bits=1)),
    "onnxsim, BiLLM": Peer(("onnxsim",), billm, sees=True),
    "optimum-quanto, qint2": Peer(QUANTO, partial(quanto, bits=2)),
    "HQQ, 2 bits": Peer(HQQ, partial(hqq, bits=2)),
    "torchao, int2": Peer(TORCHAO, partial(torchao, bits=2)),
    "optimum-quanto, qint4": Peer(QUANTO, partial(quanto, bits=4)),
    "HQQ, 4 bits": Peer(HQQ, partial(hqq, bits=4)),
    "torchao, int4": Peer(TORCHAO, partial(torchao, bits=4)),
    "onnxruntime, int8 dynamic": Peer(("onnxruntime",), partial(onnx_int8, static=False)),
    "onnxruntime, int8 static": Peer(("onnxruntime",), partial(onnx_int8, static=True), sees=True),
    "NNCF for OpenVINO, int8": Peer(("nncf", "openvino"), openvino_int8, sees=True),
}
