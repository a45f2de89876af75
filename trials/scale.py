"""What training on many GPUs costs, on paper: `python trials/scale.py`.

An ImageNet run (100 epochs, 1,024 pictures a step) of DeiT-B and ViT-H with ProxConnect++ on 1 to 512 GPUs, under each
engine: hours, memory and traffic, and the share of the time that goes to the quantizers. Nothing of it was run on
GPUs. Counted on the real models: parameters, latent weights, operations, what is kept for the backward pass, and the
bytes that the operators of the quantizer read and write. Assumed: what the hardware does a second, see the options.

The same formulas are checked here, against DeiT-T on this machine in one process and in two, with constants measured by
three separate programs: the speed of products from one run of the float model, that of the memory from a copy, and that
of the link from an all-reduce.

Formulas, for a step of b pictures a device in pieces of at most 128, n devices, P parameters, L latent weights:
    compute     3 (operations of a picture) b / speed
    quantizers  pieces L (bytes a weight) / memory bandwidth; on a CPU the backward pass makes each weight again
    optimizer   28 P / (devices that share it) / memory bandwidth: AdamW reads four and writes three numbers
    traffic     k (n - 1) / n 4 P / link, k = 2 for an all-reduce, 3 where parameters are sharded; between nodes, the
                links of all devices of a node together
and what of the traffic the backward pass does not hide. Memory: 4 bytes each for parameters, gradients and twice for
the optimizer, divided among the devices that share them, and what is kept of the pictures of a piece.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pages import RESULTS, finish, table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTForImageClassification
from transformers.initialization import no_init_weights

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import proxbit
from kept import kept_for_backward
from proxbit.analysis.environment import environment
from proxbit.patching.selection import select
from proxbit.quantizers import get_pair, quantize, recomputed_weight

# Width, depth, heads, patch.
MODELS = {"DeiT-B": (768, 12, 12, 16), "ViT-H": (1280, 32, 16, 14)}
CHECKED = (192, 12, 3, 16)
GPUS = (1, 8, 64, 512)
PICTURES, EPOCHS, BATCH, PIECE = 1_281_167, 100, 1024, 128
PAIR, BATCHES, ROUNDS, LINK_MEGABYTES = "bnn++", (2, 4), 5, 32
# The kernel of F reads W, once more where the row has left the cache, and writes w; that of B reads W and the gradient
# of w, and writes one.
FUSED_BYTES = 6 * 4


@dataclass(frozen=True)
class Counts:
    """Of one model: parameters, latent weights, operations forward and bytes kept for backward of one picture."""

    parameters: int
    latents: int
    operations: int
    kept: int


@dataclass(frozen=True)
class Machine:
    """What a device does: operations a second in training, bytes a second of its memory, of its links to the devices of
    its node and to others, devices in a node; bytes a number that is kept for the backward pass; and whether traffic
    runs beside the backward pass."""

    operations: float
    memory_bandwidth: float
    inner: float
    outer: float
    node: int
    kept_bytes: int
    overlaps: bool


@dataclass(frozen=True)
class Engine:
    """What the devices share among them (parameters, gradients, state), and within which group; passes of 4 P bytes."""

    name: str
    shares_parameters: bool
    shares_gradients: bool
    shares_state: bool
    passes: int
    within_node: bool = False


ENGINES = (
    Engine("DDP", False, False, False, 2),
    Engine("ZeRO-1", False, False, True, 2),
    Engine("ZeRO-2", False, True, True, 2),
    Engine("FSDP2, ZeRO-3", True, True, True, 3),
    Engine("FSDP2 hybrid", True, True, True, 3, within_node=True),
)


@dataclass(frozen=True)
class Cost:
    """Of a step: seconds by part; of a device: bytes sent, and bytes of memory."""

    compute: float
    quantizers: float
    optimizer: float
    exposed: float
    sent: float
    memory: float

    @property
    def seconds(self) -> float:
        return self.compute + self.quantizers + self.optimizer + self.exposed


def cost(counts: Counts, machine: Machine, engine: Engine, devices: int, batch: int, quantizer_bytes: float) -> Cost:
    """The formulas above; `quantizer_bytes` is 0 for a float model."""
    group = min(devices, machine.node) if engine.within_node else devices
    piece = min(batch, PIECE)
    compute = 3 * counts.operations * batch / machine.operations
    quantizers = math.ceil(batch / piece) * counts.latents * quantizer_bytes / machine.memory_bandwidth
    state = group if engine.shares_state else 1
    optimizer = 28 * counts.parameters / state / machine.memory_bandwidth
    sent = engine.passes * (group - 1) / group * 4 * counts.parameters
    across_nodes = min(machine.inner, machine.node * machine.outer)
    seconds = sent / (machine.inner if group <= machine.node else across_nodes)
    if group < devices:  # Gradients are summed between the groups too: each device its part.
        others = devices // group
        across = 2 * (others - 1) / others * 4 * counts.parameters / group
        sent, seconds = sent + across, seconds + across / machine.outer
    exposed = max(0.0, seconds - (2 / 3 * compute if machine.overlaps else 0.0))
    shared = (engine.shares_parameters, engine.shares_gradients, engine.shares_state, engine.shares_state)
    states = sum(4 * counts.parameters / (group if each else 1) for each in shared)
    memory = states + piece * counts.kept / 4 * machine.kept_bytes
    return Cost(compute, quantizers, optimizer, exposed, sent, memory)


class _Traffic(TorchDispatchMode):
    """Counts the bytes that operators read and write; views and empty tensors are free."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view and "empty" not in function.name() and "detach" not in function.name():
            tensors = [each for each in tree_leaves((args, kwargs, result)) if isinstance(each, Tensor)]
            self.bytes += sum(each.numel() * each.element_size() for each in tensors)
        return result


def make_model(shape: tuple[int, int, int, int]) -> ViTForImageClassification:
    width, depth, heads, patch = shape
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, "patch_size": patch}
    return ViTForImageClassification(ViTConfig(**sizes, intermediate_size=4 * width, num_labels=1000))


def count(shape: tuple[int, int, int, int]) -> Counts:
    """Without memory or time: tensors that have only shapes."""
    with FakeTensorMode():
        with no_init_weights():
            model = make_model(shape)
        latents = sum(each.parameters for each in select(model, proxbit.BinarizationConfig()) if each.converted)
        pixels, labels = torch.empty(1, 3, 224, 224), torch.empty(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter, kept_for_backward() as kept:
            model(pixels, labels=labels)
        pictures = kept.total(without=model)
        parameters = sum(parameter.numel() for parameter in model.parameters())
    return Counts(parameters, latents, counter.get_total_flops(), pictures)


def quantizer(latent: Tensor, twice: bool) -> Callable[[], None]:
    """Forward and backward of the quantizer of one layer; `twice`: the backward pass makes the weight again."""
    pair, mu, gradient = get_pair(PAIR), torch.tensor(3.0), torch.ones_like(latent)

    def step() -> None:
        weight = quantize(latent, mu, pair, pair.units)
        if twice:
            with torch.no_grad():
                made = recomputed_weight(latent, mu, pair, pair.units)
                assert made is not None
        weight.backward(gradient)

    return step


def counted_quantizer_bytes() -> float:
    """A weight and step, operator by operator, as a GPU runs them; a gradient that is accumulated is not counted."""
    latent = torch.empty(768, 768, device="meta", requires_grad=True)
    with torch.autograd.set_multithreading_enabled(False), _Traffic() as traffic:
        quantizer(latent, twice=False)()
    return traffic.bytes / latent.numel()


# --- the check: this machine, one process and two


def seconds(call: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """The median; before each, all processes meet."""
    times = []
    for _ in range(rounds + 1):
        dist.barrier()
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def make_step(model: nn.Module, batch: int) -> Callable[[], None]:
    torch.manual_seed(dist.get_rank())
    pixels, labels = torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4, fused=True)  # as the Trainer

    def step() -> None:
        optimizer.zero_grad()
        model(pixels, labels=labels).loss.backward()
        optimizer.step()

    return step


def prepared(engine: str, latent: bool) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = make_model(CHECKED)
    if latent:
        proxbit.binarize(model, proxbit.BinarizationConfig(weights=PAIR))
    if engine == "DDP":
        return DistributedDataParallel(model)
    if engine == "FSDP2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.vit.layers:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    return model


def measure(rank: int, place: str, results: str) -> None:
    """One of two processes: constants with both at work, then steps alone and together."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    found: dict[str, float] = {}
    memory, message = torch.randn(2**25), torch.randn(LINK_MEGABYTES * 2**18)
    found["memory bandwidth"] = 2 * 4 * 2**25 / seconds(memory.clone)
    # Two processes: each sends as many bytes as the message has.
    found["link"] = message.numel() * 4 / seconds(lambda: dist.all_reduce(message))
    for engine in ("one process", "DDP", "FSDP2"):
        for kind in ("float", "latent"):
            model = prepared(engine, kind == "latent")
            for batch in BATCHES:
                found[f"{engine}, {kind}, batch {batch}"] = seconds(make_step(model, batch))
    latent = torch.randn(192, 768, requires_grad=True)
    found["quantizer"] = seconds(quantizer(latent, twice=True), 101) / latent.numel()
    if rank == 0:
        Path(results).write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def check() -> tuple[list[str], dict[str, Any]]:
    """Predicted and measured times of a step."""
    counts = count(CHECKED)
    with tempfile.TemporaryDirectory() as folder:
        results = os.path.join(folder, "results.json")
        torch.multiprocessing.spawn(measure, (os.path.join(folder, "meet"), results), nprocs=2)
        found = json.loads(Path(results).read_text(encoding="utf-8"))
    bandwidth, most = found["memory bandwidth"], max(BATCHES)
    optimizer = 28 * counts.parameters / bandwidth
    speed = 3 * counts.operations * most / (found[f"one process, float, batch {most}"] - optimizer)
    here = Machine(speed, bandwidth, found["link"], found["link"], 2, 4, overlaps=False)
    engines = {"one process": (ENGINES[0], 1), "DDP": (ENGINES[0], 2), "FSDP2": (ENGINES[3], 2)}
    rows, data = [], {}
    for name, (engine, devices) in engines.items():
        for kind in ("float", "latent"):
            for batch in BATCHES:
                key = f"{name}, {kind}, batch {batch}"
                work = found["quantizer"] * bandwidth if kind == "latent" else 0.0
                predicted = cost(counts, here, engine, devices, batch, work).seconds
                data[key] = {"predicted": predicted, "measured": found[key]}
                cells = [f"{1e3 * value:.0f}" for value in (predicted, found[key])]
                rows.append([key, *cells, f"{found[key] / predicted:.2f}"])
    constants = (
        f"{speed / 1e9:.1f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s of memory, {found['link'] / 1e9:.2f} GB/s between the "
        f"processes, {found['quantizer'] * 1e9:.2f} ns a latent weight in the quantizer"
    )
    head = ["DeiT-T, a thread a process", "predicted, ms", "measured, ms", "measured / predicted"]
    left_out = "The formulas leave out the copies around each collective operation, of which FSDP2 on CPUs has many."
    begin = ["## The check", "", f"Measured with both processes at work: {constants}. {left_out}", ""]
    lines = [*begin, *table(head, rows)]
    return lines, {"constants": asdict(here) | {"quantizer": found["quantizer"]}, "steps": data}


def paper(gpu: Machine) -> tuple[list[str], dict[str, Any]]:
    """The tables of the GPUs."""
    work, steps = counted_quantizer_bytes(), math.ceil(PICTURES / BATCH) * EPOCHS
    lines, data = [], {"quantizer bytes": work}
    for name, shape in MODELS.items():
        counts, rows = count(shape), []
        for engine in ENGINES:
            for devices in GPUS:
                batch = BATCH // devices
                fused, by_operators, base = (
                    cost(counts, gpu, engine, devices, batch, each) for each in (FUSED_BYTES, work, 0)
                )
                data[f"{name}, {engine.name}, {devices}"] = asdict(fused) | {"float seconds": base.seconds}
                cells = (
                    f"{fused.seconds * steps / 3600:.2f}",
                    f"{fused.seconds / base.seconds:.2f}",
                    f"{by_operators.seconds / base.seconds:.2f}",
                    f"{fused.memory / 2**30:.1f}",
                    f"{fused.sent / 2**30:.2f}",
                    f"{fused.exposed / fused.seconds:.0%}",
                )
                rows.append([engine.name, str(devices), *cells])
        said = (
            f"{counts.parameters / 1e6:.1f} million parameters, {counts.latents / 1e6:.1f} million of them latent; "
            f"{counts.operations / 1e9:.1f} GFLOP forward and {counts.kept / 2**20:.0f} MiB kept in fp32 a picture."
        )
        head = ["engine", "GPUs", "hours", "x float", "by operators", "GiB", "GiB sent a step", "waiting for traffic"]
        lines += [f"## {name}", "", said, "", *table(head, rows)]
    return lines, data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = Machine(2.5e14, 3e12, 3e11, 2.5e10, 8, 2, overlaps=True)
    parser.add_argument("--operations", type=float, default=gpu.operations, help="a second, in training, bf16")
    parser.add_argument("--memory-bandwidth", type=float, default=gpu.memory_bandwidth, help="bytes a second")
    parser.add_argument("--inner", type=float, default=gpu.inner, help="bytes a second between GPUs of a node")
    parser.add_argument("--outer", type=float, default=gpu.outer, help="bytes a second of a GPU to other nodes")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for scale.md and scale.json")
    options = parser.parse_args()
    given = {name: value for name, value in vars(options).items() if name != "out"}
    gpu, here = replace(gpu, **given), environment()
    lines, data = paper(gpu)
    checked, measured = check()
    assumed = (
        f"Assumed: {gpu.operations / 1e12:g} TFLOP/s in training, {gpu.memory_bandwidth / 1e12:g} TB/s of memory, "
        f"{gpu.inner / 1e9:g} GB/s to the other GPUs of a node of {gpu.node}, {gpu.outer / 1e9:g} GB/s to other nodes; "
        "bf16 autocast. Nothing in these tables was run on GPUs; only the check was measured."
    )
    columns = (
        "`x float` is the time of a step as a multiple of the float model's. In Triton's kernels the quantizer "
        f"`{PAIR}` reads and writes {FUSED_BYTES} bytes a latent weight and piece of at most {PIECE} pictures, if a "
        f"row stays in the cache; `by operators`, as a pair without kernels does, {data['quantizer bytes']:.0f}, which "
        "shows where a GPU has few pictures a step. Gradients are as large as those of the float model, so traffic is "
        "the same."
    )
    title = f"`python trials/scale.py`: {EPOCHS} epochs of ImageNet, {BATCH} pictures a step. {here}."
    page = [title, "", assumed, "", columns, "", *lines, *checked]
    finish("scale", page, {"assumed": asdict(gpu), "paper": data, "check": measured}, here, options.out)


if __name__ == "__main__":
    main()
