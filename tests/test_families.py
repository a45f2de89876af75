"""Every family of models: binarize, a step of training, pack, save, reload, and the same logits all the way."""

import math

import pytest
import torch
import transformers as hf
from torch import nn

import proxbit
from proxbit.nn import PackedConv2d, latent_layers
from proxbit.patching import packed_layers, state_of
from tiny_models import FAMILIES, LABELS, SIDE, vit

LEFT = {
    "vit": ["vit.embeddings.patch_embeddings.projection", "classifier"],
    "deit": ["deit.embeddings.patch_embeddings.projection", "classifier"],
    "beit": ["beit.embeddings.patch_embeddings.projection", "classifier"],
    "swin": ["swin.embeddings.patch_embeddings.projection", "classifier"],
    "dinov2": ["dinov2.embeddings.patch_embeddings.projection", "classifier"],
    "clip": ["vision_model.embeddings.patch_embedding", "classifier"],
    "siglip": [
        "vision_model.embeddings.patch_embedding",
        "vision_model.head.attention.out_proj",
        "vision_model.head.mlp.fc1",
        "vision_model.head.mlp.fc2",
        "classifier",
    ],
    "convnext": [
        "convnext.embeddings.patch_embeddings",
        "convnext.encoder.stages.0.layers.0.dwconv",
        "convnext.encoder.stages.1.layers.0.dwconv",
        "classifier",
    ],
    "resnet": ["resnet.embedder.embedder.convolution", "classifier.1"],
    "mobilevit": ["mobilevit.conv_stem.convolution", "classifier"],
}
SIDES = {"mobilevit": 128}  # its last stage attends to 1/32 of the side, in patches of 2 x 2
PATCHES = {"vit": "patch_embeddings.projection", "dinov2": "patch_embeddings.projection", "clip": "patch_embedding"}


def lively(model, pictures):
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
            model.train()(pixel_values=pictures)
    return model.eval()


def take_one_step(model, examples, folder):
    """One optimizer step of the Trainer: the loss, and the latent layers in which no weight has changed."""
    before = {name: layer.weight.detach().clone() for name, layer in latent_layers(model)}
    arguments = proxbit.ProxConnectArguments(
        folder,
        max_steps=1,
        per_device_train_batch_size=len(examples),
        learning_rate=1e-3,
        hard_fraction=0.0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    result = proxbit.ProxConnectTrainer(model=model, args=arguments, train_dataset=examples).train()
    same = [name for name, layer in latent_layers(model) if torch.equal(layer.weight, before[name])]
    return result.training_loss, same


@torch.no_grad()
def answer(model, **inputs):
    """What the model is for: logits, a reconstruction, or features."""
    outputs = model.eval()(**inputs)
    (name,) = {"logits", "reconstruction", "last_hidden_state"} & set(outputs)
    return outputs[name]


def pack_save_and_reload(model, folder, **inputs):
    """Check that latent hard, packed and reloaded are the same to 1e-4, and return the reloaded model."""
    hard = answer(model, **inputs)
    proxbit.pack(model).save_pretrained(folder)
    again = type(model).from_pretrained(folder)
    assert [name for name, _ in packed_layers(again)] == [name for name, _ in packed_layers(model)]
    for packed in (model, again):
        assert state_of(packed) == "packed"
        torch.testing.assert_close(answer(packed, **inputs), hard, rtol=0, atol=1e-4)
    return again


@pytest.mark.parametrize("family", FAMILIES)
def test_from_binarize_to_reload(family, crops, tmp_path):
    pictures = crops(4, SIDES.get(family, SIDE))
    model = lively(FAMILIES[family](), pictures)
    start = answer(model, pixel_values=pictures)
    proxbit.binarize(model)
    hard = answer(model, pixel_values=pictures)
    assert (hard - start).abs().max() > 1e-2
    assert (hard - hard[:1]).abs().max() > 1e-2
    examples = [{"pixel_values": picture, "labels": i % LABELS} for i, picture in enumerate(pictures)]
    loss, unchanged = take_one_step(model, examples, tmp_path / "run")
    assert math.isfinite(loss)
    assert unchanged == []
    assert (answer(model, pixel_values=pictures) - hard).abs().max() > 1e-4
    pack_save_and_reload(model, tmp_path / "packed", pixel_values=pictures)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_alone(family):
    """Patch embeddings and stems, heads, and depthwise convolutions; all other layers are binary."""
    model = FAMILIES[family]()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    depthwise = {name for name, m in layers.items() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1}
    report = proxbit.binarize(model).binarization_report
    assert set(report.left) == {*LEFT[family], *depthwise}
    assert set(report.converted) == set(layers) - set(report.left)
    assert all(report.left[name] == "depthwise convolution" for name in depthwise)
    assert len(depthwise) == {"convnext": 2, "mobilevit": 7}.get(family, 0)


@pytest.mark.parametrize("family", PATCHES)
@pytest.mark.parametrize("include", ["patches", "everything"])
def test_binary_patch_embeddings(family, include, crops, tmp_path):
    """On request. These models cast the pixels to the dtype of that weight, which must not be the one of the bits."""
    pictures = crops(4, SIDE)
    model = lively(FAMILIES[family](), pictures)
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
    model = lively(hf.ViTForMaskedImageModeling(vit(encoder_stride=8)), pictures)
    masked = torch.arange(16) % 3 == 0
    report = proxbit.binarize(model).binarization_report
    assert len(report.converted) == 12
    assert set(report.left) == {"vit.embeddings.patch_embeddings.projection", "decoder.0"}
    examples = [{"pixel_values": picture, "bool_masked_pos": masked} for picture in pictures]
    loss, unchanged = take_one_step(model, examples, tmp_path / "run")
    assert math.isfinite(loss)
    assert unchanged == []
    inputs = {"pixel_values": pictures, "bool_masked_pos": masked.expand(4, -1)}
    again = pack_save_and_reload(model, tmp_path / "packed", **inputs)
    assert again(**inputs).reconstruction.shape == (4, 3, SIDE, SIDE)


@pytest.mark.parametrize("pooler", [True, False], ids=["with pooler", "without pooler"])
def test_feature_extractor(pooler, crops, tmp_path):
    """A ViT without a head: hidden states, and the pooler, which stays float."""
    pictures = crops(4, SIDE)
    model = lively(hf.ViTModel(vit(), add_pooling_layer=pooler), pictures)
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
