"""Every family of the table: binarize, a step of training, pack, save, reload, and the same results all the way."""

import math
from fnmatch import fnmatchcase
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from torch import nn
from transformers.models.timm_wrapper import modeling_timm_wrapper

import proxbit
from families import TABLE, classes, pixels
from proxbit.nn import PackedConv2d, latent_layers
from proxbit.patching import packed_layers, state_of
from tiny_models import FAMILIES, LABELS, SIDE, vit

PATCHES = {"vit": "patch_embeddings.projection", "dinov2": "patch_embeddings.projection", "clip": "patch_embedding"}


def lively(model, inputs):
    """The model with new weights of which every one is felt: fresh layer scales of 1e-6, for one, hide their layers,
    and so does a deep stack of batch norms that have not seen any picture.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
            else:
                parameter.add_(0.1 * noise)
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        if norms:
            model.train()(**inputs)
    return model.eval()


def take_one_step(model, batch, loss=None):
    """One optimizer step of the soft model: the latent layers that no gradient reached."""
    proxbit.set_mu(model.train(), 1.0)
    called, latents = set(), dict(latent_layers(model))
    for name, layer in latents.items():
        layer.register_forward_hook(lambda module, inputs, output, name=name: called.add(name))
    outputs = model(**(batch if loss is None else {key: batch[key] for key in batch if key != "labels"}))
    (outputs["loss"] if loss is None else loss(outputs)).backward()
    assert called == set(latents)
    unreached = [name for name, layer in latents.items() if not layer.weight.grad.abs().max() > 0]
    torch.optim.AdamW(model.parameters(), lr=1e-3).step()
    model.zero_grad()
    return unreached


def tensors(outputs):
    """What the model is for: logits, boxes and masks of one picture after the other; or its features."""
    kinds = ("logits", "pred_boxes", "class_queries_logits", "masks_queries_logits", "logits_per_image")
    kinds += ("predicted_depth", "reconstruction")
    found = [outputs[kind] for kind in kinds if kind in outputs] or [outputs["last_hidden_state"]]
    return found[0] if len(found) == 1 else torch.cat([tensor.flatten(1) for tensor in found], dim=1)


@torch.no_grad()
def answer(model, **inputs):
    """The same in evaluation mode, without a gradient."""
    return tensors(model.eval()(**inputs))


def tolerance(expected):
    """1e-4 of what is largest, and of 1."""
    return 1e-4 * max(1.0, float(expected.abs().max()))


def pack_save_and_reload(model, folder, **inputs):
    """Check that latent hard, packed and reloaded are the same to 1e-4 of what is largest; return the reloaded one."""
    hard = answer(model, **inputs)
    proxbit.pack(model).save_pretrained(folder)
    again = type(model).from_pretrained(folder)
    assert [name for name, _ in packed_layers(again)] == [name for name, _ in packed_layers(model)]
    for packed in (model, again):
        assert state_of(packed) == "packed"
        torch.testing.assert_close(answer(packed, **inputs), hard, rtol=0, atol=tolerance(hard))
    return again


@pytest.mark.parametrize("family", TABLE)
def test_from_binarize_to_reload(family, crops, tmp_path):
    row = TABLE[family]
    inputs = row.inputs(crops(4, row.side))
    model = lively(FAMILIES[family](), inputs)
    start = answer(model, **inputs)
    proxbit.binarize(model)
    hard = answer(model, **inputs)
    assert (hard - start).abs().max() > 1e-2
    assert (hard - hard[:1]).abs().max() > 1e-2
    unreached = take_one_step(model, inputs | row.labels(4), row.loss)
    assert [name for name in unreached if not any(fnmatchcase(name, pattern) for pattern in row.still)] == []
    assert (answer(model, **inputs) - hard).abs().max() > 1e-4
    again = pack_save_and_reload(model, tmp_path / "packed", **inputs)
    packed = answer(again, **inputs)
    torch.testing.assert_close(answer(proxbit.fuse(again, inputs), **inputs), packed, rtol=0, atol=tolerance(packed))


@pytest.mark.parametrize("family", ["siglip", "yolos", "mask2former"])
def test_the_trainer_takes_its_batches(family, crops, tmp_path):
    """A label a picture, lists of dictionaries, lists of masks."""
    row = TABLE[family]
    inputs = row.inputs(crops(4, row.side))
    model = proxbit.binarize(lively(FAMILIES[family](), inputs))
    before = {name: layer.weight.detach().clone() for name, layer in latent_layers(model)}
    arguments = proxbit.ProxConnectArguments(
        tmp_path,
        max_steps=1,
        learning_rate=1e-3,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
    )
    trainer = proxbit.ProxConnectTrainer(
        model=model,
        args=arguments,
        train_dataset=[inputs | row.labels(4)],
        data_collator=lambda batches: batches[0],
    )
    assert math.isfinite(trainer.train().training_loss)
    assert [name for name, layer in latent_layers(model) if torch.equal(layer.weight, before[name])] == []


@pytest.mark.parametrize("family", TABLE)
def test_what_is_left_alone(family):
    """As the table says: every layer is named by it, on one side, and every name of it is of a layer."""
    row, model = TABLE[family], FAMILIES[family]()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    depthwise = {name for name, m in layers.items() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1}
    named = {
        pattern: {name for name in layers if fnmatchcase(name, pattern)} for pattern in (*row.binarized, *row.left)
    }
    assert all(named.values()), named
    binarized, left = (set().union(*(named[p] for p in patterns)) for patterns in (row.binarized, row.left))
    assert binarized | left == set(layers)
    assert binarized & left == set()
    assert depthwise - left == set()
    report = proxbit.binarize(model).binarization_report
    assert set(report.converted) == binarized
    assert set(report.left) == left


class TimmBlock(nn.Module):
    """A block without tokens, with the names of timm's vision transformers."""

    def __init__(self, width):
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 50), "fc2": nn.Linear(50, width)})

    def forward(self, x):
        queries, keys, values = self.attn.qkv(x).chunk(3, dim=-1)
        x = x + self.attn.proj((queries @ keys.mT / 6).softmax(dim=-1) @ values)
        return x + self.mlp.fc2(nn.functional.gelu(self.mlp.fc1(x)))


class TimmModel(nn.Module):
    """Stands for `timm.create_model`: timm itself needs torchvision."""

    def __init__(self, architecture, pretrained, num_classes, width):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 8, stride=8)})
        self.blocks = nn.Sequential(TimmBlock(width), TimmBlock(width))
        self.head, self.head_dist = nn.Linear(width, num_classes), nn.Linear(width, num_classes)

    def forward(self, x):
        x = self.blocks(self.patch_embed.proj(x).flatten(2).mT).mean(dim=1)
        return (self.head(x) + self.head_dist(x)) / 2


def test_timm_through_its_wrapper(monkeypatch, crops, tmp_path):
    monkeypatch.setattr(modeling_timm_wrapper, "timm", SimpleNamespace(create_model=TimmModel), raising=False)
    monkeypatch.setattr(modeling_timm_wrapper, "requires_backends", lambda *names: None)
    config = hf.TimmWrapperConfig(architecture="any", num_labels=LABELS, model_args={"width": 36})
    inputs = pixels(crops(4, SIDE))
    model = lively(modeling_timm_wrapper.TimmWrapperForImageClassification(config), inputs)
    report = proxbit.binarize(model).binarization_report
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert list(report.converted) == [f"timm_model.blocks.{i}.{layer}" for i in (0, 1) for layer in layers]
    assert set(report.left) == {"timm_model.patch_embed.proj", "timm_model.head", "timm_model.head_dist"}
    assert take_one_step(model, inputs | classes(4)) == []
    pack_save_and_reload(model, tmp_path, **inputs)


@pytest.mark.parametrize("family", PATCHES)
@pytest.mark.parametrize("include", ["patches", "everything"])
def test_binary_patch_embeddings(family, include, crops, tmp_path):
    """On request. These models cast the pixels to the dtype of that weight, which must not be the one of the bits."""
    pictures = crops(4, SIDE)
    model = lively(FAMILIES[family](), pixels(pictures))
    start = answer(model, pixel_values=pictures)
    patterns = [f"*.{PATCHES[family]}"] if include == "patches" else ["*"]
    proxbit.binarize(model, proxbit.BinarizationConfig(include=patterns))
    assert (answer(model, pixel_values=pictures) - start).abs().max() > 1e-2
    again = pack_save_and_reload(model, tmp_path, pixel_values=pictures)
    convolutions = [layer for _, layer in packed_layers(again) if isinstance(layer, PackedConv2d)]
    assert len(convolutions) == 1
    assert convolutions[0].weight.dtype == torch.float32
    assert again.state_dict()[f"{packed_layers(again)[0][0]}.weight"].dtype == torch.uint8


def test_masked_image_modelling(crops, tmp_path):
    """A ViT that learns to paint: its decoder is a head and stays float."""
    pictures = crops(4, SIDE)
    model = lively(hf.ViTForMaskedImageModeling(vit(encoder_stride=8)), pixels(pictures))
    masked = torch.arange(16) % 3 == 0
    report = proxbit.binarize(model).binarization_report
    assert len(report.converted) == 12
    assert set(report.left) == {"vit.embeddings.patch_embeddings.projection", "decoder.0"}
    inputs = {"pixel_values": pictures, "bool_masked_pos": masked.expand(4, -1)}
    assert take_one_step(model, inputs) == []
    again = pack_save_and_reload(model, tmp_path / "packed", **inputs)
    assert again(**inputs).reconstruction.shape == (4, 3, SIDE, SIDE)


@pytest.mark.parametrize("pooler", [True, False], ids=["with pooler", "without pooler"])
def test_feature_extractor(pooler, crops, tmp_path):
    """A ViT without a head: hidden states, and the pooler, which stays float."""
    pictures = crops(4, SIDE)
    model = lively(hf.ViTModel(vit(), add_pooling_layer=pooler), pixels(pictures))
    start = answer(model, pixel_values=pictures)
    report = proxbit.binarize(model).binarization_report
    assert len(report.converted) == 12
    assert set(report.left) == {"embeddings.patch_embeddings.projection", *(["pooler.dense"] if pooler else [])}
    hard = answer(model, pixel_values=pictures)
    assert (hard - start).abs().max() > 1e-2
    assert hard.shape == (4, 17, 36)
    proxbit.pack(model).save_pretrained(tmp_path)
    again = hf.ViTModel.from_pretrained(tmp_path, add_pooling_layer=pooler)
    for packed in (model, again):
        torch.testing.assert_close(answer(packed, pixel_values=pictures), hard, rtol=0, atol=1e-4)
