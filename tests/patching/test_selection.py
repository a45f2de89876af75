"""Which modules are selected: patterns, defaults, and every selection that must be refused."""

from functools import partial

import accelerate
import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn.utils import prune as pruning

import proxbit
from proxbit.config import BinarizationConfig
from proxbit.errors import PatternError
from proxbit.patching import select, state_of
from proxbit.patching.selection import explicit_patterns, matches
from proxbit.sign import sign
from tiny_models import FAMILIES, vit

ATTENTION = [f"attention.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
LAYER = [*ATTENTION, "mlp.fc1", "mlp.fc2"]
PATCHES = "vit.embeddings.patch_embeddings.projection"


def layers(*numbers):
    """Names of the linear modules of some layers of a ViT, in the order of the model."""
    return [f"vit.layers.{number}.{name}" for number in numbers for name in LAYER]


def tree(**modules):
    """A model without a forward, from modules and their names with `__` for the dots."""
    model = nn.Module()
    for name, module in modules.items():
        *parents, last = name.split("__")
        parent = model
        for part in parents:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, module)
    return model


def selected(model, **changes):
    return [decision.name for decision in select(model, BinarizationConfig(**changes)) if decision.converted]


def reasons(model, **changes):
    decisions = select(model, BinarizationConfig(**changes))
    return {decision.name: decision.reason for decision in decisions if not decision.converted}


@pytest.fixture
def model():
    return hf.ViTForImageClassification(vit())


class OwnLinear(nn.Linear):
    """A linear layer that computes in its own way."""


def test_a_pattern_names_a_module_or_one_it_lies_in():
    matching = [
        "vit.layers.1.mlp.fc1",
        "vit.layers.*.mlp.fc1",
        "vit.*.fc1",
        "vit.layers.?.mlp.fc[12]",
        "vit.layers.[!0].mlp.fc1",
        "*",
        "*.fc1",
        "vit",
        "vit.layers.1",
        "vit.layers.*.mlp",
    ]
    others = [
        "vit.layers.1.",
        "vit.layers.1.mlp.fc",
        "vit.layers.1.mlp.fc11",
        "vit.layers.1.mlp.fc1.*",
        "vit.layers.0",
        "layers.1",
        "fc1",
        "VIT.*",
        "",
    ]
    assert [pattern for pattern in (*matching, *others) if matches("vit.layers.1.mlp.fc1", pattern)] == matching


def test_a_container_with_more_digits_is_another():
    assert not matches("vit.layers.10.mlp.fc1", "vit.layers.1")


SELECTIONS = [
    (dict(), layers(0, 1)),
    (dict(include=["vit.layers.0"]), layers(0)),
    (dict(include=["vit.layers.*.mlp.fc2"]), ["vit.layers.0.mlp.fc2", "vit.layers.1.mlp.fc2"]),
    (dict(include=["vit.layers.1.mlp", "vit.layers.0"]), [*layers(0), *layers(1)[4:]]),
    (dict(include=["classifier", PATCHES]), [PATCHES, "classifier"]),
    (dict(include=["*"]), [PATCHES, *layers(0, 1), "classifier"]),
    (dict(modules_to_not_convert=["vit.layers.1"]), layers(0)),
    (dict(modules_to_not_convert=["vit.layers.1.mlp", "*.?_proj"]), layers(0)[4:]),
    (dict(modules_to_not_convert=["classifier"]), layers(0, 1)),
    (dict(include=["vit.layers"], modules_to_not_convert=["vit.layers.0"]), layers(1)),
    (dict(include=["vit.layers.0"], modules_to_not_convert=["*.attention"]), layers(0)[4:]),
]


def test_selection(model):
    """`modules_to_not_convert` wins over `include`, and `include` over the defaults."""
    for changes, expected in SELECTIONS:
        assert selected(model, **changes) == expected, changes


def test_reasons(model):
    found = reasons(model, include=["vit.layers", "classifier"], modules_to_not_convert=["vit.layers.0"])
    expected = dict.fromkeys(layers(0), "modules_to_not_convert: vit.layers.0")
    assert found == expected | {PATCHES: "not in include"}
    assert reasons(model) == {PATCHES: "embedding", "classifier": "head"}


def test_what_lies_beside_the_backbone_is_a_head():
    found = reasons(FAMILIES["dpt depth"]())
    assert found["neck.convs.0"] == "outside the backbone: task head"
    assert found["head.head.0"] == "head"


def test_frozen_weights_are_left_unless_they_are_named(model):
    """Without training a layer would stay at the signs of its float weights."""
    for name in layers(0):
        model.get_submodule(name).weight.requires_grad_(False)
    assert selected(model) == layers(1)
    assert reasons(model)["vit.layers.0.mlp.fc1"] == "frozen: it would stay at its signs"
    assert selected(model, include=["vit.layers.0"]) == layers(0)


def test_one_decision_for_every_linear_and_convolution(model):
    decisions = select(model, BinarizationConfig())
    weights = {name: module.weight for name, module in model.named_modules() if type(module) in (nn.Linear, nn.Conv2d)}
    assert [decision.name for decision in decisions] == list(weights)
    assert [decision.parameters for decision in decisions] == [weight.numel() for weight in weights.values()]
    assert [decision.kind for decision in decisions] == ["Conv2d", *["Linear"] * 13]


NAMED = [
    ("encoder__patch_embed__proj", nn.Linear(8, 8), "embedding"),
    ("embeddings__projection", nn.Linear(8, 8), "embedding"),
    ("word_embedding", nn.Linear(8, 8), "embedding"),
    ("blocks__0__relative_position__mlp", nn.Linear(8, 8), "position encoding"),
    ("blocks__0__rel_pos_bias__mlp", nn.Linear(8, 8), "position encoding"),
    ("blocks__0__attn__meta_mlp__fc1", nn.Linear(8, 8), "position encoding"),
    ("bbox_attention__k_proj", nn.Linear(8, 8), "head"),
    ("layers__0__self_attn__sampling_offsets", nn.Linear(8, 8), "where deformable attention looks"),
    ("text_model__layers__0__fc1", nn.Linear(8, 8), "text side"),
    ("conv_stem__conv", nn.Conv2d(8, 8, 3), "stem"),
    ("stem__0", nn.Conv2d(8, 8, 3), "stem"),
    ("pooler__dense", nn.Linear(8, 8), "pooler"),
    ("head", nn.Linear(8, 8), "head"),
    ("mlp_head__fc1", nn.Linear(8, 8), "head"),
    ("fc", nn.Linear(8, 8), "head"),
    ("classifier__1", nn.Linear(8, 8), "head"),
    ("visual_projection", nn.Linear(8, 8), "head"),
    ("attn_pool__proj", nn.Linear(8, 8), "pooler"),
    ("head_dist", nn.Linear(8, 8), "head"),
    ("classifier_distill", nn.Linear(8, 8), "head"),
    ("bbox_predictor__layers__0", nn.Linear(8, 8), "head"),
    ("decoder__mask_projection", nn.Conv2d(8, 8, 1), "head"),
    ("predictor__layers__0__mlp__fc1", nn.Linear(8, 8), None),
    ("blocks__dwconv", nn.Conv2d(8, 8, 3, groups=8), "depthwise convolution"),
    ("blocks__expanding", nn.Conv2d(8, 16, 3, groups=8), "depthwise convolution"),
    ("blocks__conv", nn.Conv2d(3, 8, 3), "reads the pixels"),
    ("blocks__conv", nn.Conv2d(8, 8, 3, groups=2), None),
    ("blocks__0__mlp__fc1", nn.Linear(8, 8), None),
    ("blocks__0__attention__out_proj", nn.Linear(8, 8), None),
    ("blocks__overhead__dense", nn.Linear(8, 8), None),
    ("system__dense", nn.Linear(8, 8), None),
]


def test_defaults_go_by_name_and_geometry():
    """`None` stands for "binarized". The layer beside it keeps the selection from being empty."""
    for name, module, reason in NAMED:
        model = tree(**{name: module, "body": nn.Linear(8, 8)})
        assert reasons(model).get(name.replace("__", ".")) == reason, name
        assert "body" in selected(model)


BY_ITSELF = "its model reads its weight, or the dtype of it, by itself"


class Reader(nn.Module):
    """Multiplies by the weights of `own` and `inner.deep` itself, and goes by the dtypes of `cast` and `table`."""

    def __init__(self):
        super().__init__()
        self.own, self.cast, self.table, self.called = (nn.Linear(8, 8) for _ in range(4))
        self.inner = nn.Module()
        self.inner.deep, self.inner.called = nn.Linear(8, 8), nn.Linear(8, 8)
        self.filters = nn.Conv2d(8, 8, 1)  # packed, it has a weight with a dtype all the same
        self.kernel = nn.Conv2d(8, 8, 1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(2))
        self.steps = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.turn, self.gates = nn.Linear(8, 8), nn.ModuleList([nn.Linear(8, 8)])

    @torch.no_grad()
    def start(self):
        self.called.weight.zero_()

    def init_non_persistent_buffers(self):
        self.numbers = torch.arange(8, dtype=self.table.weight.dtype)

    def prepared(self, x):
        x = x.to(self.called.weight.device)
        return x.to(self.cast.weight.dtype) if x.is_floating_point() else self.prepared(x.float())

    def forward(self, x):
        x = self.cast(self.prepared(x)) + x.to(self.filters.weight.dtype)
        x = nn.functional.conv2d(x, self.kernel.weight) @ self.blocks[-1][0].weight
        for step in self.steps:
            x = nn.functional.linear(x, step.weight)
        for number, (gate, _) in enumerate(zip(self.gates, self.steps, strict=True)):
            x = nn.functional.linear(x, gate.weight) + number
        turn = self.turn
        x = x @ turn.weight
        return nn.functional.linear(x @ self.inner.deep.weight, weight=self.own.weight) + self.inner.called(x)


@pytest.mark.parametrize("changes", [{}, {"include": ["*"]}], ids=["by default", "on request"])
def test_layers_that_are_read_instead_of_called_are_left(changes):
    model = nn.ModuleDict({"block": Reader()})
    read = [
        "own",
        "cast",
        "table",
        "inner.deep",
        "kernel",
        "blocks.0.0",
        "blocks.1.0",
        "steps.0",
        "steps.1",
        "turn",
        "gates.0",
    ]
    assert reasons(model, **changes) == {f"block.{name}": BY_ITSELF for name in read}
    called = ["called", "inner.called", "filters", "blocks.0.1", "blocks.1.1"]
    assert selected(model, **changes) == [f"block.{name}" for name in called]


def test_the_mlp_of_pix2struct_is_read():
    sizes = {"hidden_size": 16, "d_ff": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "d_kv": 8}
    model = hf.Pix2StructVisionModel(hf.Pix2StructVisionConfig(patch_embed_hidden_size=12, **sizes))
    assert [name for name, reason in reasons(model).items() if reason == BY_ITSELF] == ["encoder.layer.0.mlp.wo"]


def test_without_the_source_of_a_model():
    """As where a class was made in a session: nothing is known of it."""
    names = {"nn": nn}
    exec("class Block(nn.Module):\n    def forward(self, x):\n        return x @ self.own.weight", names)
    model = names["Block"]()
    model.own = nn.Linear(8, 8)
    assert selected(model) == ["own"]


class Switched(nn.Module):
    """Attention as in timm's BEiT, which adds its biases itself."""

    def __init__(self):
        super().__init__()
        self.qkv, self.bias, self.qkv_bias_separate = nn.Linear(8, 24, bias=False), nn.Parameter(torch.ones(24)), False

    def forward(self, x):
        if self.qkv_bias_separate:
            return self.qkv(x) + self.bias
        return nn.functional.linear(x, weight=self.qkv.weight, bias=self.bias)


def test_attention_of_timm_is_told_to_call_its_layer():
    model, x = Switched(), torch.randn(3, 8)
    expected = x @ (sign(model.qkv.weight) * model.qkv.weight.abs().mean(dim=1, keepdim=True)).T + 1
    proxbit.binarize(model, BinarizationConfig(weights="bnn"))
    torch.testing.assert_close(model.eval()(x), expected)
    torch.testing.assert_close(proxbit.pack(model)(x), expected)


@pytest.mark.parametrize("field", ["include", "modules_to_not_convert"])
@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("vit.layer.0.mlp.fc1", "Near misses: vit.layers.0.mlp.fc1"),
        ("vit.encoder.layer.0.attention.attention.query", "Near misses: vit.layers"),
        ("Classifier", "Near misses: classifier"),
        ("vit.layers.7", "Near misses: vit.layers"),
    ],
    ids=["typo", "name in a checkpoint", "upper case", "no such layer"],
)
def test_a_pattern_that_matches_nothing_shows_near_misses(model, field, pattern, near):
    with pytest.raises(PatternError, match="matches no module") as caught:
        select(model, BinarizationConfig(**{field: ["vit.layers.0", pattern]}))
    assert f"{field}: the pattern {pattern!r}" in str(caught.value)
    assert near in str(caught.value)
    assert "model.named_modules()" in str(caught.value)


def test_a_pattern_far_from_everything_has_no_near_misses(model):
    with pytest.raises(PatternError, match="'####' matches no module. Patterns name"):
        select(model, BinarizationConfig(include=["####"]))


def test_include_must_meet_a_module_that_can_be_binarized(model):
    """A layer norm is a module, and yet nothing to include; to leave one alone is no error."""
    with pytest.raises(PatternError, match=r"include: the pattern 'vit\.layernorm' matches no module"):
        select(model, BinarizationConfig(include=["vit.layernorm"]))
    assert selected(model, modules_to_not_convert=["vit.layernorm"]) == layers(0, 1)


@pytest.mark.parametrize("changes", [dict(include=[]), dict(modules_to_not_convert=["*"])], ids=str)
def test_an_empty_selection_is_refused(model, changes):
    with pytest.raises(PatternError, match="Nothing to binarize in ViTForImageClassification") as caught:
        select(model, BinarizationConfig(**changes))
    assert "it has 14 linear and convolutional modules, all left as they are" in str(caught.value)
    assert f"{PATCHES}: " in str(caught.value)
    assert "include=[...]" in str(caught.value)


def test_a_model_with_only_a_head_has_nothing_to_binarize():
    with pytest.raises(PatternError, match="Nothing to binarize in Module: it has 1 .*\n  head: head\n"):
        select(tree(head=nn.Linear(4, 2), norm=nn.LayerNorm(4)), BinarizationConfig())


def test_tied_weights_are_refused_with_both_names():
    model = tree(encoder__up=nn.Linear(4, 4), decoder__down=nn.Linear(4, 4))
    model.decoder.down.weight = model.encoder.up.weight
    with pytest.raises(PatternError, match=r"encoder\.up\.weight is tied: it is also decoder\.down\.weight") as caught:
        select(model, BinarizationConfig())
    assert "modules_to_not_convert=['encoder.up']" in str(caught.value)
    with pytest.raises(PatternError, match=r"decoder\.down\.weight is tied: it is also encoder\.up\.weight"):
        select(model, BinarizationConfig(include=["decoder"]))


def test_a_weight_tied_to_an_embedding_is_refused():
    model = tree(tokens=nn.Embedding(4, 8), body=nn.Linear(8, 4))
    model.body.weight = model.tokens.weight
    with pytest.raises(PatternError, match=r"body\.weight is tied: it is also tokens\.weight"):
        select(model, BinarizationConfig())


def test_a_layer_that_two_modules_share_is_refused():
    shared = nn.Linear(4, 4)
    with pytest.raises(PatternError, match=r"first\.weight is tied: it is also second\.weight"):
        select(tree(first=shared, second=shared, body=nn.Linear(4, 4)), BinarizationConfig())


def test_tied_weights_that_stay_float_are_fine():
    model = tree(first=nn.Linear(4, 4), second=nn.Linear(4, 4), body=nn.Linear(4, 4))
    model.second.weight = model.first.weight
    assert selected(model, modules_to_not_convert=["first", "second"]) == ["body"]


def test_a_subclass_of_a_layer_is_left_alone():
    model = tree(block__own=OwnLinear(4, 4), block__plain=nn.Linear(4, 4))
    assert selected(model) == selected(model, include=["block"]) == ["block.plain"]
    assert reasons(model) == {"block.own": "OwnLinear computes in its own way"}
    with pytest.raises(PatternError, match=r"include: the pattern 'block\.own' matches no module"):
        select(model, BinarizationConfig(include=["block.own"]))


@pytest.mark.parametrize("family", ["vit", "swin", "detr", "convnext", "segformer", "mobilevit"])
def test_explicit_patterns_select_the_same(family):
    """With the defaults, and with every second of those modules."""
    model = FAMILIES[family]()
    names = selected(model)
    for chosen in (names, names[::2], names[:1]):
        config = BinarizationConfig(include=chosen)
        patterns = explicit_patterns(chosen, reasons(model, include=chosen))
        assert selected(model, include=patterns) == selected(model, include=config.include) == chosen


def test_explicit_patterns_are_short_where_they_can_be(model):
    everything = [f"vit.layers.*.{name}" for name in LAYER]
    assert explicit_patterns(layers(0, 1), [PATCHES, "classifier"]) == everything
    kept = "vit.layers.1.mlp.fc1"
    chosen = [name for name in layers(0, 1) if name != kept]
    exact = [pattern if not pattern.endswith("fc1") else "vit.layers.0.mlp.fc1" for pattern in everything]
    assert explicit_patterns(chosen, [PATCHES, "classifier", kept]) == exact


@pytest.mark.parametrize("name", ["blocks[0]", "a*b", "a?b"])
def test_explicit_patterns_take_names_as_they_are(name):
    """Characters of a name that mean something else in a pattern."""
    model = nn.ModuleDict({"body": nn.ModuleDict({name: nn.Linear(4, 4), "a-b": nn.Linear(4, 4)})})
    (pattern,) = explicit_patterns([f"body.{name}"], ["body.a-b"])
    assert selected(model, include=[pattern]) == [f"body.{name}"]


def test_state_of():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    states = [state_of(model)]
    for convert in (proxbit.binarize, proxbit.pack, proxbit.dequantize):
        states.append(state_of(convert(model)))
    assert states == ["float", "latent", "packed", "float"]
    assert model(torch.ones(1, 4)).shape == (1, 2)


def prune(layer):
    pruning.l1_unstructured(layer, "weight", 0.5)


@pytest.mark.parametrize("change", [nn.utils.weight_norm, prune])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_weight_that_is_made_of_others_is_left_alone(change):
    model = FAMILIES["vit"]()
    change(model.vit.layers[0].mlp.fc1)
    left = proxbit.binarize(model).binarization_report.left
    assert "vit.layers.0.mlp.fc1" in left
    assert "vit.layers.1.mlp.fc1" not in left


def test_a_layer_with_a_forward_of_its_own_is_left_alone():
    """As accelerate gives one to layers whose weights are elsewhere until they are called."""
    model = FAMILIES["vit"]()
    layer = model.vit.layers[0].mlp.fc1
    layer.forward = partial(type(layer).forward, layer)
    report = proxbit.binarize(model).binarization_report
    assert report.converted and "vit.layers.0.mlp.fc1" in report.left
    with pytest.raises(PatternError, match="its forward was replaced, as by the hooks of accelerate"):
        proxbit.binarize(accelerate.cpu_offload(FAMILIES["vit"](), torch.device("cpu")))


def test_a_layer_without_a_weight_yet_is_left_alone():
    model = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(8))
    report = proxbit.binarize(model, proxbit.BinarizationConfig(include=["0"])).binarization_report
    assert [(each.name, each.parameters) for each in report.decisions] == [("0", 64), ("1", 0)]
