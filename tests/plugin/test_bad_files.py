"""Spoiled checkpoints load right or are clear errors; nothing is unpickled, and nothing outside the folder is touched.

The ways to spoil are those of `trials/fuzz.py`, which tries ten thousand.
"""

import importlib.util
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageClassification, ViTForImageClassification

import proxbit
from proxbit.errors import ConfigError, ProxbitError
from proxbit.hub.release import write_release
from tiny_models import SIDE, vit

FILE = Path(__file__).parents[2] / "trials" / "fuzz_mutations.py"
specification = importlib.util.spec_from_file_location(FILE.stem, FILE)
mutations = importlib.util.module_from_spec(specification)
specification.loader.exec_module(mutations)

CHECKPOINTS = ("packed", "shards", "latent", "release")
# What each of the special ones ends with: a part of the message of proxbit, or None where nothing that matters changed.
ENDS = {
    "untouched": None,
    "bomb: header claims 4 TiB": r"model.*\.safetensors is truncated or damaged",
    "bomb: sparse file of 4 TiB": r"read: unable to mmap|truncated|ignore_mismatched_sizes|do not fit|size is",
    "index: path out of the folder": r"index\.json names '\.\./outside/.*', which is not the name of a file",
    "index: absolute path": r"index\.json names '/.*', which is not the name of a file",
    "index: path into a folder": r"index\.json names 'sub/.*', which is not the name of a file",
    "index: name that is no text": r"index\.json names .*, which is not the name of a file",
    "index: a pickle": r"names 'pytorch_model\.bin': weights are safetensors files; nothing is unpickled",
    "index: missing file": r"model-00009-of-00009\.safetensors is missing: model\.safetensors\.index\.json beside it",
    "card: paths": r"is not in quantization_card\.json beside it",
    "pickle: pytorch_model.bin alone": r"It holds pytorch_model\.bin: .* nothing is unpickled",
    "pickle: alone, no dtype in config.json": r"It holds pytorch_model\.bin: .* nothing is unpickled",
    "pickle: pytorch_model.bin.index.json": r"It holds shard\.bin: .* nothing is unpickled",
    "pickle: named model.safetensors": r"model\.safetensors is truncated or damaged",
    "pickle: the same, no dtype": r"model\.safetensors is truncated or damaged",
    "pickle: beside, pytorch_model.bin": None,
    "pickle: beside, optimizer.pt": None,
    "pickle: beside, training_args.bin": None,
    "link: to the weights": None,
    "link: to nothing": r"has no file model\.safetensors|is missing",
    "link: to itself": r"has no file model\.safetensors|is missing",
    "link: to /dev/zero": r"has no file model\.safetensors|is missing",
    "pipe: weights": r"has no file model\.safetensors|is missing",
    "pipe: card": None,
    "folder: weights": r"has no file model\.safetensors|is missing",
    "folder: card": None,
    "config: transformers_weights out of the folder": r"outside/model\.safetensors",
    "config: transformers_weights is a pickle": r"pytorch_model\.bin",
    "config: remote code": None,
    "config: a billion layers": r"config\.json: num_hidden_layers is 1000000000, but the weight files hold \d+ tensors",
    "config: a picture of a billion pixels a side": r"config\.json: image_size is 1000000000, but the weight",
    "config: wide layers": r"config\.json: hidden_size is 1099511627776, but the weight files hold",
    "config: patterns that take for ever": r"matches? no",
}
# Before proxbit is asked, transformers makes a billion names of labels, and reads what is given as a configuration.
OF_TRANSFORMERS = {"config: a billion labels", "link: config.json to /dev/zero", "link: card to itself"}
OF_PROXBIT = sorted(set(mutations.KINDS) - {"config.json", "no JSON", "processor JSON", "bits of any file"})


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Each kind of checkpoint, and what is in it."""
    folder = tmp_path_factory.mktemp("originals")

    def make(**options):
        return proxbit.binarize(
            ViTForImageClassification(vit(num_hidden_layers=1)), proxbit.BinarizationConfig(weights="pc", **options)
        )

    proxbit.pack(make(activations="sign")).save_pretrained(folder / "packed")
    proxbit.pack(make()).save_pretrained(folder / "shards", max_shard_size="10KB")
    make(activations="int8").save_pretrained(folder / "latent")
    write_release(proxbit.pack(make()), folder / "release")
    return {name: (folder / name, load(folder / name).state_dict()) for name in CHECKPOINTS}


def load(folder):
    return AutoModelForImageClassification.from_pretrained(folder)


@pytest.fixture
def case(originals, tmp_path, monkeypatch):
    """Spoil a copy of a checkpoint and load it: the model, or the error. The world around it stays as it was."""

    def forbidden(*arguments, **keywords):
        raise AssertionError("something was unpickled")

    def run(name, mutate, seed):
        rng = random.Random(seed)
        folder = tmp_path / f"{name}-{seed}" / "checkpoint"
        shutil.copytree(originals[name][0], folder)
        mutate(folder, rng)
        before = sorted(map(str, tmp_path.rglob("*")))
        with monkeypatch.context() as patch:
            for each in ("pickle.load", "pickle.loads", "pickle.Unpickler", "pickle._Unpickler", "torch.load"):
                patch.setattr(each, forbidden)
            try:
                result = load(folder)
            except (ProxbitError, OSError, ValueError, RuntimeError) as error:
                result = error
        assert sorted(map(str, tmp_path.rglob("*"))) == before
        return result

    return run


def equal(model, tensors):
    found = model.state_dict()
    return found.keys() == tensors.keys() and all(torch.equal(found[key], tensors[key]) for key in found)


def checkpoint_of(special):
    """Cards lie beside a release, an index beside shards; the rest of the attacks takes turns."""
    kind = special.partition(":")[0]
    return {"card": "release", "index": "shards"}.get(kind) or CHECKPOINTS[1 + list(ENDS).index(special) % 3]


@pytest.mark.parametrize("kind", sorted({special.partition(":")[0] for special in ENDS}))
def test_special(case, originals, kind):
    for number, special in enumerate(each for each in ENDS if each.partition(":")[0] == kind):
        name = checkpoint_of(special)
        result = case(name, mutations.SPECIAL[special], number)
        if ENDS[special] is None:
            assert equal(result, originals[name][1]), (special, result)
        elif special == "bomb: sparse file of 4 TiB" and not isinstance(result, Exception):
            assert equal(result, originals[name][1])  # The tensor of terabytes is one that the model does not have.
        else:
            assert isinstance(result, Exception), f"{special}: it was loaded"
            assert re.search(ENDS[special], str(result)), (special, str(result))
            if not special.startswith(("bomb: sparse", "config: transformers_weights")):
                assert isinstance(result, ProxbitError), (special, repr(result))


def test_every_special_case_is_here():
    assert set(ENDS) | OF_TRANSFORMERS == set(mutations.SPECIAL)


@pytest.mark.parametrize("kinds", [OF_PROXBIT[i::4] for i in range(4)], ids=["1", "2", "3", "4"])
def test_random_changes(case, originals, kinds):
    """Errors of proxbit, or of transformers with the report of every tensor that does not fit; never of a loop deep
    inside of it, and never a crash."""
    for number, kind in ((number, kind) for kind in kinds for number in range(4)):
        seed = 4 * OF_PROXBIT.index(kind) + number
        result = case(CHECKPOINTS[number], mutations.KINDS[kind], seed)
        if isinstance(result, RuntimeError):
            assert str(result).startswith(("You set `ignore_mismatched_sizes`", "Error(s) in loading")), repr(result)
        elif isinstance(result, Exception):
            assert isinstance(result, (ProxbitError, OSError, ValueError)) and len(str(result)) > 20, repr(result)
            assert not isinstance(result, SafetensorError)
        else:
            with torch.inference_mode():
                assert result(torch.zeros(1, 3, SIDE, SIDE)).logits.shape[0] == 1


def test_unpickling_cannot_be_asked_for(originals):
    with pytest.raises(ConfigError, match="weights_only=False is for pickles; proxbit has none"):
        AutoModelForImageClassification.from_pretrained(originals["packed"][0], weights_only=False)
