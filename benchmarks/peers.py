"""One linear layer by everyone who is installed: `linear_peers(x, weight, bias)` gives a call for each."""

import functools
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from transformers.integrations.bitnet import BitLinear, pack_weights

from proxbit.kernels import linear_w1, linear_w1a1, linear_w1a8, pack_signs

try:
    import onnx
    import onnxruntime
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize_dynamic as quantize_onnx
except ImportError:
    onnx = None

Call = Callable[[], object]

FP32, BF16, INT8_TORCH = "torch fp32", "torch bf16", "torch.ao int8 dynamic"
INT8_ONNX, BITLINEAR = "onnxruntime int8 dynamic", "HF BitLinear"
OURS = ("linear_w1", "linear_w1a8", "linear_w1a1")
INT8_PEERS = (INT8_TORCH, INT8_ONNX)
PEERS = (FP32, BF16, *INT8_PEERS, BITLINEAR)


def linear_peers(x: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Call]:
    """Calls that compute the same layer, fp32 in and fp32 out (bf16: bf16 in and out), by the name of who does it."""
    bits, scale = pack_signs(weight), weight.abs().mean(dim=1)
    half = [tensor.bfloat16() for tensor in (x, weight, bias)]
    calls: dict[str, Call] = {
        FP32: lambda: nn.functional.linear(x, weight, bias),
        BF16: lambda: nn.functional.linear(*half),
    }
    if any(engine != "none" for engine in torch.backends.quantized.supported_engines):
        calls[INT8_TORCH] = functools.partial(int8_dynamic(weight, bias), x)
    if onnx is not None:
        session, numbers = onnx_session(*weight.shape, torch.get_num_threads()), {"x": x.numpy()}
        calls[INT8_ONNX] = lambda: session.run(None, numbers)
    if bitlinear_works():
        calls[BITLINEAR] = functools.partial(bitlinear(*weight.shape), x)
    calls["linear_w1"] = lambda: linear_w1(x, bits, scale, bias)
    calls["linear_w1a8"] = lambda: linear_w1a8(x, bits, scale, bias)
    calls["linear_w1a1"] = lambda: linear_w1a1(x, bits, scale, bias)
    return calls


def int8_dynamic(weight: Tensor, bias: Tensor) -> nn.Module:
    """The layer as torch.ao makes it."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = quantize_dynamic(nn.Sequential(layer), {nn.Linear}, dtype=torch.qint8)
    return model[0]


@functools.cache
def onnx_bytes(outputs: int, inputs: int) -> bytes:
    """A quantized model of one layer. Its weights are random: time does not depend on them."""
    weight, bias = torch.randn(inputs, outputs).numpy() * 0.02, torch.randn(outputs).numpy()
    tensor = functools.partial(onnx.helper.make_tensor_value_info, elem_type=onnx.TensorProto.FLOAT)
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "weight"], ["product"]),
        onnx.helper.make_node("Add", ["product", "bias"], ["y"]),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "linear",
        [tensor("x", shape=[None, inputs])],
        [tensor("y", shape=[None, outputs])],
        [onnx.numpy_helper.from_array(weight, "weight"), onnx.numpy_helper.from_array(bias, "bias")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "linear.onnx")
        # It advises steps for whole networks.
        logging.disable(logging.WARNING)
        quantize_onnx(model, path, per_channel=True, weight_type=QuantType.QInt8)
        logging.disable(logging.NOTSET)
        return path.read_bytes()


def onnx_session(outputs: int, inputs: int, threads: int) -> "onnxruntime.InferenceSession":
    """onnxruntime on a layer of these sizes."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Otherwise its threads still spin when the next candidate is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(onnx_bytes(outputs, inputs), options, ["CPUExecutionProvider"])


def bitlinear(outputs: int, inputs: int) -> nn.Module:
    """BitLinear as transformers ships it, with random ternary weights."""
    layer = BitLinear(inputs, outputs, bias=True, dtype=torch.float32)
    layer.weight = nn.Buffer(pack_weights(torch.randint(-1, 2, (outputs, inputs))))
    return layer


@functools.cache
def bitlinear_works() -> bool:
    """BitLinear compiles parts of itself at its first call, which needs a compiler."""
    # One compilation for every kind of shape, or it falls back to eager halfway through.
    torch._dynamo.config.recompile_limit = 1024
    try:
        bitlinear(8, 8)(torch.randn(2, 8))
    except Exception as error:
        print(f"{BITLINEAR} is left out: {str(error).partition(chr(10))[0]}")
        return False
    return True
