"""Work-arounds: the fault they are for is still there, and they mend it."""

import pytest
import torch
from transformers import ViTForImageClassification

import proxbit
from proxbit.errors import CheckpointError
from proxbit.plugin.compat import download_arguments, is_lost_process, restore_specs, tensor_specs
from tiny_models import vit


def test_floats_get_the_dtype_that_was_asked_for():
    model = proxbit.pack(proxbit.binarize(ViTForImageClassification(vit())))
    wanted = {name: (shape, torch.bfloat16) for name, (shape, _) in tensor_specs(model).items()}
    bits = {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor.dtype == torch.uint8}
    restore_specs(model, wanted)
    found = model.state_dict()
    assert bits and all(torch.equal(found[name], tensor) for name, tensor in bits.items())
    assert {tensor.dtype for name, tensor in found.items() if name not in bits} == {torch.bfloat16}


def test_other_shapes_are_refused():
    model = ViTForImageClassification(vit())
    wanted = tensor_specs(model)
    model.classifier = torch.nn.Linear(36, 7)
    with pytest.raises(CheckpointError, match=r"classifier\.weight is \[7, 36\] in the checkpoint, and .* \[3, 36\]"):
        restore_specs(model, wanted)


def test_what_from_pretrained_downloads_with_is_seen_from_inside(tmp_path, monkeypatch):
    """Outside of it there is nothing to see."""
    proxbit.binarize(ViTForImageClassification(vit())).save_pretrained(tmp_path)
    seen = []
    monkeypatch.setattr(
        "proxbit.plugin.hf_quantizer.check_against_card", lambda files, name: seen.append(download_arguments())
    )
    ViTForImageClassification.from_pretrained(tmp_path, token="hf_secret", cache_dir=tmp_path)
    (arguments,) = seen
    assert (arguments["token"], arguments["cache_dir"]) == ("hf_secret", tmp_path)
    assert download_arguments() == {}


def test_which_errors_say_that_a_process_is_lost():
    """`tests/training/test_faults.py` has the real one of gloo."""
    gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:1770: Connection reset"
    assert is_lost_process(RuntimeError(gloo)) and is_lost_process(torch.distributed.DistNetworkError("closed"))
    assert not is_lost_process(RuntimeError("out of memory")) and not is_lost_process(OSError(gloo))
