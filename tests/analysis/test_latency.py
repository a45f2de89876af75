"""Latencies in the form that cards tell them. No test depends on how fast a machine is."""

import transformers as hf

import proxbit
from proxbit.analysis.environment import environment
from proxbit.analysis.latency import measure_latency
from proxbit.analysis.run import check_run
from tiny_models import vit


def test_a_packed_model_is_timed_against_its_float_self():
    model = proxbit.pack(proxbit.binarize(hf.ViTForImageClassification(vit())))
    found = measure_latency(model, batch=2, rounds=3)
    assert check_run({"latency": found})["latency"] == found
    assert (found["batch"], found["rounds"]) == (2, 3)
    assert {"float", "packed, float"} <= set(found["milliseconds"])
    assert all(milliseconds > 0 for milliseconds in found["milliseconds"].values())
    assert environment().cpu in found["machine"] and found["machine"].endswith("1 thread")
    assert proxbit.summary(model).state == "packed"
