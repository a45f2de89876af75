"""Packed models as programs of torch.export, and as ONNX files that onnxruntime runs without proxbit."""

import importlib.util
import io
import sys

import onnx
import onnxruntime
import pytest
import torch
import transformers as hf

import proxbit
from proxbit.errors import ConfigError, ModelStateError
from tiny_models import SIDE, vit

UINT8 = onnx.TensorProto.UINT8


def packed(pictures, activations="float", **changes):
    """One block, in all shapes a bit can have: linear layers, and the patch embedding."""
    torch.manual_seed(0)
    model = hf.ViTForImageClassification(vit(num_hidden_layers=1, **changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    config = proxbit.BinarizationConfig(activations=activations, include=["vit"])
    return proxbit.pack(proxbit.calibrate(proxbit.binarize(model, config), [pictures], weights=False)).eval()


@torch.no_grad()
def logits(model, pictures):
    return model(pixel_values=pictures).logits


def run(path, pictures):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"pixel_values": pictures.numpy()})[0])


@pytest.mark.parametrize("fused", [False, True], ids=["packed", "fused"])
@pytest.mark.parametrize("activations", ["float", "int8", "int4", "sign"])
def test_a_program_of_torch_export(activations, fused, crops):
    """Its operators are those of proxbit, its weights bits, also when it comes back from a file."""
    pictures = crops(3, SIDE)
    model = packed(pictures, activations)
    if fused:
        proxbit.fuse(model)
    expected, file = logits(model, pictures), io.BytesIO()
    with torch.no_grad():
        program = torch.export.export(model, (), {"pixel_values": pictures})
        torch.export.save(program, file)
        file.seek(0)
        again = torch.export.load(file)
        torch.testing.assert_close(again.module()(pixel_values=pictures).logits, expected)
    name = {"float": "linear_w1", "sign": "linear_w1a1"}.get(activations, "linear_w1a8")
    called = [node for node in again.graph.nodes if f"proxbit.{name}." in str(node.target)]
    assert len(called) == 6
    plain = 4 if activations == "float" else 5
    assert any(len(node.args) > plain for node in called) == fused
    held = [name for name, tensor in again.state_dict.items() if tensor.dtype == torch.uint8]
    assert len(held) == 7


@pytest.mark.parametrize(("activations", "fused"), [("float", True), ("sign", False)])
def test_onnx(activations, fused, crops, tmp_path):
    """The same predictions for batches of any size, of standard operators; binarized weights are bits, and the file is
    as large as the packed one and its graph.
    """
    pictures = crops(5, SIDE)
    model = packed(pictures, activations, hidden_size=192, intermediate_size=768)
    if fused:
        proxbit.fuse(model)
    path = proxbit.export_onnx(model, tmp_path / "model.onnx")
    for count in (1, 5):
        expected, found = logits(model, pictures[:count]), run(path, pictures[:count])
        # A rounding elsewhere may tip a sign.
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-2 if activations == "sign" else 1e-4)
        assert torch.equal(found.argmax(dim=-1), expected.argmax(dim=-1))
    file = onnx.load(path)
    onnx.checker.check_model(file, full_check=True)
    assert {node.domain for node in file.graph.node} == {""}
    assert not file.functions
    bits = [onnx.numpy_helper.to_array(each) for each in file.graph.initializer if each.data_type == UINT8]
    held = [tensor.numpy() for tensor in model.state_dict().values() if tensor.dtype == torch.uint8]
    assert sorted(array.tobytes() for array in bits) == sorted(array.tobytes() for array in held)
    bytes_packed = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    assert path.stat().st_size < bytes_packed + 40_000


def test_what_is_exported_is_packed():
    model = hf.ViTForImageClassification(vit())
    with pytest.raises(ModelStateError, match="this one is float: torch.onnx.export writes float models"):
        proxbit.export_onnx(model, "never.onnx")
    with pytest.raises(ModelStateError, match=r"this one is latent: proxbit\.pack\(model\) first"):
        proxbit.export_onnx(proxbit.binarize(model), "never.onnx")


def test_what_it_takes_is_tensors(crops):
    model = proxbit.pack(proxbit.binarize(hf.ViTForImageClassification(vit())))
    for value in (True, torch.tensor(True)):
        with pytest.raises(ConfigError, match="the input interpolate_pos_encoding must be a tensor whose first axis"):
            proxbit.export_onnx(model, "never.onnx", {"interpolate_pos_encoding": value})


def test_without_onnxscript_the_error_says_what_to_install(monkeypatch):
    specification = importlib.util.find_spec("proxbit.export")
    monkeypatch.setitem(sys.modules, "onnxscript.optimizer", None)
    with pytest.raises(ImportError, match=r"pip install 'proxbit\[onnx\]'"):
        specification.loader.exec_module(importlib.util.module_from_spec(specification))
