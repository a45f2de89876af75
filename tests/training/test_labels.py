"""A head for other classes: rows stay with their labels, and the others are new."""

import pytest
import torch
import transformers as hf
from torch import nn

from proxbit.errors import CheckpointError
from proxbit.training.labels import give_labels
from tiny_models import SIDE, vit

OLD = ["banana", "apple", "cherry"]


def classifier(**changes):
    torch.manual_seed(0)
    labels = {"id2label": dict(enumerate(OLD)), "label2id": {name: i for i, name in enumerate(OLD)}}
    return hf.ViTForImageClassification(vit(**labels | changes)).eval()


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (["apple", "banana", "zucchini"], {0: 1, 1: 0}),
        (["x", "y", "z"], {}),
        (["Cherry", "x"], {0: 2}),
        (["a", "b", "c", "cherry", "d"], {3: 2}),
        (["Apple", "apple"], {}),
    ],
)
def test_rows_stay_with_their_labels(names, kept, crops):
    model = classifier()
    old, before = model.classifier, model(crops(2, SIDE)).logits
    assert give_labels(model, names) == [names[i] for i in kept]
    head = model.classifier
    assert head.weight.shape == (len(names), old.in_features) and head.out_features == len(names)
    assert model.config.id2label == dict(enumerate(names)) and model.config.label2id[names[0]] == 0
    assert model.num_labels == model.config.num_labels == len(names)
    after = model(crops(2, SIDE)).logits
    for new, number in kept.items():
        assert torch.equal(head.weight[new], old.weight[number]) and torch.allclose(after[:, new], before[:, number])
    for new in set(range(len(names))) - set(kept):
        assert not any(torch.equal(head.weight[new], row) for row in old.weight)


def test_two_heads_and_no_numbers_of_labels(crops):
    sizes = vit().to_dict() | {"id2label": dict(enumerate(OLD)), "model_type": "deit"}
    model = hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**sizes)).eval()
    model.config.label2id = None
    rows = model.distillation_classifier.weight[1].clone()
    assert give_labels(model, ["x", "apple"]) == ["apple"]
    assert torch.equal(model.distillation_classifier.weight[1], rows)
    assert model(crops(2, SIDE)).logits.shape == (2, 2)


def test_another_kind_of_head_is_refused():
    class Odd(hf.ViTForImageClassification):
        def __init__(self, config):
            super().__init__(config)
            self.classifier = nn.Bilinear(config.hidden_size, 2, config.num_labels)

    with pytest.raises(CheckpointError, match="Odd cannot be given a new head: .*Bilinear"):
        give_labels(Odd(classifier().config), ["a", "b"])
