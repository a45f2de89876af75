"""`summary`: what a model is made of, layer by layer, in one table."""

import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any, Literal

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from proxbit.checkpoint.weights import as_saved, packed_spec
from proxbit.foreign import printable
from proxbit.nn import LatentWeight, PackedConv2d, PackedLinear, dtype_around, evaluating, latent_layers
from proxbit.nn.precision import trained_in_small_steps
from proxbit.patching import IMAGE_ERRORS, blank_image
from proxbit.posttraining import calibration_of

__all__ = ["LayerSummary", "ModelSummary", "summary"]

FLOAT32_BYTES = 4
WIDTH = 120
NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


# torch counts the fused attention of GPUs only.
CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


@dataclass(frozen=True)
class LayerSummary:
    """One line of the table: a layer, or several alike. All numbers are sums over the layers it stands for.

    Attributes:
        name: as in `model.named_modules()`; layer numbers are ranges where layers are alike.
        count: how many layers the line stands for.
        kind: class of the layer.
        state: "float", "latent" or "packed".
        bits: of one weight, as stored.
        binary_parameters: weights of one bit; in a latent layer, weights that will be.
        float_parameters: all other parameters and saved numbers, row scales included.
        bytes: of the layer's tensors in a checkpoint, as it is now.
        packed_bytes: of the layer's tensors once it is packed.
        float32_bytes: of the layer's tensors in the same model in fp32.
        macs: multiply-accumulates for one image; None if not counted.
        kernel: what computes a latent or packed layer.
        error: the mean relative error of the layer's output, before and after its weight was fitted to data; None
            where it was not, or nobody knows.
    """

    name: str
    count: int
    kind: str
    state: str
    bits: int
    binary_parameters: int
    float_parameters: int
    bytes: int
    packed_bytes: int
    float32_bytes: int
    macs: int | None
    kernel: str
    error: tuple[float, float] | None = None


@dataclass(frozen=True)
class ModelSummary:
    """The layers of a model and their totals; `str()` of it is a table.

    Attributes:
        model: class of the model.
        layers: the lines of the table.
        header_bytes: of the header of a checkpoint, which holds names and shapes.
        packed_header_bytes: the same once the model is packed, with the names of the scales.
        total_macs: multiply-accumulates for one image, attention included; None if not counted.
        note: what the multiply-accumulates stand for, or why they were not counted.
    """

    model: str
    layers: tuple[LayerSummary, ...]
    header_bytes: int
    packed_header_bytes: int
    total_macs: int | None
    note: str

    def _sum(self, attribute: str) -> int:
        return sum(getattr(layer, attribute) for layer in self.layers)

    @property
    def state(self) -> str:
        """ "float", "latent" or "packed"."""
        return max((layer.state for layer in self.layers), key=("float", "latent", "packed").index, default="float")

    @property
    def binary_parameters(self) -> int:
        """Weights of one bit."""
        return self._sum("binary_parameters")

    @property
    def float_parameters(self) -> int:
        """All other numbers of the checkpoint."""
        return self._sum("float_parameters")

    @property
    def file_bytes(self) -> int:
        """Bytes of the checkpoint as the model is now: tensors and header."""
        return self._sum("bytes") + self.header_bytes

    @property
    def packed_bytes(self) -> int:
        """Bytes of the checkpoint once the model is packed: tensors and header."""
        return self._sum("packed_bytes") + self.packed_header_bytes

    @property
    def float32_bytes(self) -> int:
        """Bytes of the checkpoint of the same model in fp32: tensors and header."""
        return self._sum("float32_bytes") + self.header_bytes

    @property
    def compression_ratio(self) -> float:
        """Bytes in fp32 / bytes once packed."""
        return self.float32_bytes / self.packed_bytes

    @property
    def binary_macs(self) -> int | None:
        """Multiply-accumulates with a 1-bit weight, for one image; None if not counted."""
        if self.total_macs is None:
            return None
        return sum(layer.macs or 0 for layer in self.layers if layer.state != "float")

    def __str__(self) -> str:
        return self.to_text()

    def to_text(self, width: int = WIDTH) -> str:
        """The table for a terminal of so many columns: a narrow one gets fewer."""
        wide = width >= WIDTH
        columns = [column for column in COLUMNS if column.at in (None, "wide" if wide else "narrow")]
        columns += [ERROR] if any(layer.error for layer in self.layers) else []
        table = Table(title=f"{self.model} ({self.state})", box=SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
        table.add_column("module", overflow="fold", min_width=38 if wide else None)
        for column in columns:
            table.add_column(column.title, justify=column.justify, no_wrap=True)
        shown = ""
        for layer in self.layers:
            block, name = _block_and_name(layer.name)
            if block != shown:
                table.add_row(f"{block}" if block else "")
                shown = block
            times = f" ×{layer.count}" if layer.count > 1 else ""
            table.add_row(f"{'  ' if block else ''}{name}{times}", *(column.cell(layer) for column in columns))
        stream = io.StringIO()
        console = Console(file=stream, width=width, color_system=None, highlight=False)
        console.print(table)
        for line in self._totals():
            console.print(line, soft_wrap=wide)
        if not wide:
            more = ", ".join(column.title for column in COLUMNS if column.at == "wide")
            console.print(f"In {WIDTH} columns also: {more}")
        return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())

    def to_dict(self) -> dict[str, Any]:
        """Layers and totals as JSON types."""
        totals = ("state", "binary_parameters", "float_parameters", "file_bytes", "packed_bytes", "float32_bytes")
        return {**asdict(self), **{name: getattr(self, name) for name in (*totals, "binary_macs")}}

    def _totals(self) -> Iterator[str]:
        weights = self.binary_parameters + self.float_parameters
        share = self.binary_parameters / max(1, weights)
        yield f"parameters   {self.binary_parameters:,} of 1 bit ({share:.1%}), {self.float_parameters:,} float"
        if self.state == "latent":
            yield f"checkpoint   {self.file_bytes:,} bytes now: latent weights, simulated"
            yield (
                f"once packed  {self.packed_bytes:,} bytes, {self.compression_ratio:.1f}x smaller than fp32 "
                f"({self.float32_bytes:,})"
            )
        elif self.state == "packed":
            yield (
                f"checkpoint   {self.file_bytes:,} bytes, {self.compression_ratio:.1f}x smaller than fp32 "
                f"({self.float32_bytes:,})"
            )
        else:
            yield f"checkpoint   {self.file_bytes:,} bytes"
        if self.total_macs is not None and self.binary_macs is not None:
            yield (
                f"MACs         {_short(self.binary_macs)} of 1 bit "
                f"({self.binary_macs / max(1, self.total_macs):.1%}), "
                f"{_short(self.total_macs - self.binary_macs)} float, attention included; {self.note}"
            )
        else:
            yield f"MACs         not counted: {self.note}"


def _block_and_name(name: str) -> tuple[str, str]:
    """A layer's name in two parts: up to its last number, and the rest."""
    parts = name.split(".")
    numbered = [i for i, part in enumerate(parts) if part[0].isdigit()]
    cut = numbered[-1] + 1 if numbered and numbered[-1] + 1 < len(parts) else 0
    return ".".join(parts[:cut]), ".".join(parts[cut:])


def _short(value: int | None) -> str:
    """A number with three digits and a unit."""
    if value is None:
        return "?"
    size = float(value)
    for unit in ("", " k", " M", " G"):
        if size < 999.5:
            return f"{size:.3g}{unit}"
        size /= 1000
    return f"{size:.3g} T"


@dataclass(frozen=True)
class _Column:
    """A column behind the name of the layer; some are for a wide terminal only, or for a narrow one."""

    title: str
    cell: Callable[[LayerSummary], str]
    justify: Literal["left", "right"] = "right"
    at: Literal["wide", "narrow"] | None = None


def _macs(layer: LayerSummary) -> str:
    return _short(layer.macs) if layer.macs is None or layer.macs else ""


COLUMNS = (
    _Column("state", lambda layer: layer.state, "left"),
    _Column("bits", lambda layer: str(layer.bits), at="wide"),
    _Column("1-bit", lambda layer: _short(layer.binary_parameters) if layer.binary_parameters else ""),
    _Column("float", lambda layer: _short(layer.float_parameters) if layer.float_parameters else ""),
    _Column("bytes", lambda layer: f"{_short(layer.bytes)}B" if layer.bytes >= 1000 else f"{layer.bytes} B"),
    _Column("1-bit MACs", lambda layer: _macs(layer) if layer.state != "float" else "", at="wide"),
    _Column("float MACs", lambda layer: _macs(layer) if layer.state == "float" else "", at="wide"),
    _Column("MACs", _macs, at="narrow"),
    _Column("kernel", lambda layer: layer.kernel, "left", at="wide"),
)
ERROR = _Column("error", lambda layer: f"{layer.error[0]:.2f} → {layer.error[1]:.2f}" if layer.error else "")


def summary(model: nn.Module, inputs: dict[str, Tensor] | None = None, *, count_macs: bool = True) -> ModelSummary:
    """What a model is made of: states, bits, bytes, multiply-accumulates, kernels.

    Args:
        model: any module, in any state.
        inputs: keyword arguments of one forward pass with one image, to count multiply-accumulates with. None: a
            blank image of the size in the model's configuration (224 x 224 if it has none).
        count_macs: False: do not run the model, and count none.

    Returns:
        A table to print (`str`) or to read (its attributes).
    """
    macs, total, note = _count_macs(model, inputs) if count_macs else (None, None, "not asked for")
    seen: set[int] = set()
    header: dict[str, Tensor] = {}
    of_packed: dict[str, Tensor] = {}
    around = dtype_around(model)
    single = {id(each) for _, each in trained_in_small_steps(model)} if any(latent_layers(model)) else set()
    layers, report = [], calibration_of(model)
    errors = {layer.name: (layer.before, layer.after) for layer in report.layers} if report else {}
    for name, module in model.named_modules():
        tensors, packed, prefix = {}, {}, f"{name}." if name else ""
        for key, tensor in _stored(module).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                tensors[key] = tensor
                header[f"{prefix}{key}"] = _meta(tensor.shape, tensor.dtype)
                packed[key] = _meta(tensor.shape, around if id(tensor) in single else tensor.dtype)
        if isinstance(module, LatentWeight) and "weight" in tensors:
            packed["weight"] = packed_spec(module.weight)
            packed |= dict.fromkeys(_beside_bits(module), _meta(module.weight.shape[:1], around))
        if tensors:
            of_packed |= {f"{prefix}{key}": tensor for key, tensor in packed.items()}
            described = _describe(name, module, tensors, None if macs is None else macs.get(name, 0))
            packed_bytes = sum(tensor.nbytes for tensor in packed.values())
            layers.append(replace(described, packed_bytes=packed_bytes, error=errors.get(name)))
    sizes = [_header_bytes(as_saved(model, each)) for each in (header, of_packed)]
    return ModelSummary(type(model).__name__, tuple(_fold(layers)), sizes[0], sizes[1], total, note)


def _meta(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _header_bytes(tensors: dict[str, Tensor]) -> int:
    """Bytes before the tensors of a safetensors file: the length, and JSON padded to a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        begin, end = end, end + tensor.nbytes
        kind = str(tensor.dtype).removeprefix("torch.")
        tag = "BOOL" if kind == "bool" else f"{'BF' if kind[0] == 'b' else kind[0].upper()}{8 * tensor.element_size()}"
        header[name] = {"dtype": tag, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    return 8 + 8 * -(-len(json.dumps(header, separators=(",", ":"))) // 8)


def _beside_bits(layer: LatentWeight) -> tuple[str, ...]:
    """What a layer has beside its bits once it is packed: one number a row each."""
    return ("weight_scale", "weight_offset") if layer.units.has_offset else ("weight_scale",)


def _stored(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module itself that a checkpoint holds."""
    kept = {name: buffer for name, buffer in module._buffers.items() if name not in module._non_persistent_buffers_set}
    tensors = {**module._parameters, **kept}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _describe(name: str, module: nn.Module, tensors: dict[str, Tensor], macs: int | None) -> LayerSummary:
    sizes = {key: tensor.numel() * tensor.element_size() for key, tensor in tensors.items()}
    in_float32 = {
        key: tensor.numel() * (FLOAT32_BYTES if tensor.is_floating_point() else tensor.element_size())
        for key, tensor in tensors.items()
    }
    stored, state, kernel, binary = sum(sizes.values()), "float", "", 0
    others = sum(tensor.numel() for tensor in tensors.values())
    bits = 8 * max(tensor.element_size() for tensor in tensors.values())
    if isinstance(module, LatentWeight) and "weight" in tensors:
        state, kernel, binary = "latent", "simulated", module.weight.numel()
        others -= binary
    elif isinstance(module, PackedLinear | PackedConv2d):
        state, kernel, binary, bits = "packed", module.kernel, len(module.weight_scale) * module.columns, 1
        others -= tensors["weight"].numel()
        in_float32 |= {"weight": FLOAT32_BYTES * binary, "weight_scale": 0, "weight_offset": 0}
    return LayerSummary(
        name=name or "(model)",
        count=1,
        kind=type(module).__name__,
        state=state,
        bits=bits,
        binary_parameters=binary,
        float_parameters=others,
        bytes=stored,
        packed_bytes=stored,
        float32_bytes=sum(in_float32.values()),
        macs=macs,
        kernel=kernel,
    )


def _fold(layers: list[LayerSummary]) -> Iterator[LayerSummary]:
    """Put layers that differ only in the numbers of their names on one line, where the first of them stands."""
    groups: dict[tuple[Any, ...], list[LayerSummary]] = {}
    for layer in layers:
        groups.setdefault((NUMBER.sub("#", layer.name), replace(layer, name="", error=None)), []).append(layer)
    for alike in groups.values():
        numbers = zip(*(map(int, NUMBER.findall(layer.name)) for layer in alike), strict=True)
        spans = iter([f"{min(n)}-{max(n)}" if min(n) < max(n) else str(n[0]) for n in numbers])
        sums = {
            key: sum(getattr(layer, key) for layer in alike)
            for key in ("count", "binary_parameters", "float_parameters", "bytes", "packed_bytes", "float32_bytes")
        }
        macs = None if alike[0].macs is None else sum(layer.macs or 0 for layer in alike)
        name = ".".join(next(spans) if part.isdigit() else part for part in alike[0].name.split("."))
        errors = [layer.error for layer in alike if layer.error]
        error = (fmean(before for before, _ in errors), fmean(after for _, after in errors)) if errors else None
        yield replace(alike[0], name=name, macs=macs, error=error, **sums)


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """torch counts along the gradients of what modules are given: of a parameter, under `no_grad`, that fails."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _count_macs(model: nn.Module, inputs: dict[str, Tensor] | None) -> tuple[dict[str, int] | None, int | None, str]:
    """Multiply-accumulates by module name, their total with attention, and a note."""
    inputs = blank_image(model) if inputs is None else inputs
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    try:
        with evaluating(model), _without_gradients(model), torch.no_grad(), counter:
            model(**inputs)
    except IMAGE_ERRORS as error:
        reason = printable(str(error).splitlines()[0]) if str(error) else type(error).__name__
        return None, None, f"the model did not take a blank image ({reason}); pass inputs={{...}}"
    root = f"{type(model).__name__}."
    counts = {name.removeprefix(root): sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}
    own = {
        name: counts.get(name, 0) - sum(counts.get(f"{name}.{child}", 0) for child, _ in module.named_children())
        for name, module in model.named_modules()
    }
    shape = " x ".join(str(size) for size in next(iter(inputs.values())).shape[1:])
    return own, counter.get_total_flops() // 2, f"one image of {shape}"
