"""Names that are none: the right reason, after one question to the Hub at most."""

import socket

import pytest

from proxbit.training.sources import is_path, why_nowhere


@pytest.mark.parametrize("name", ["./x", "../x", "/nowhere/x", "~/x", "a/b/c", "a b", "x\\y", "runs/digits/"])
def test_what_can_only_be_a_path(name):
    assert is_path(name)
    assert why_nowhere(name, "model") == "there is no folder of that name"


def test_what_may_be_a_repository_is_none_where_its_folder_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not is_path("runs/digits") and not is_path("digits") and not is_path("google/vit-base-patch16-224")
    (tmp_path / "runs" / "digits-flat").mkdir(parents=True)
    assert is_path("runs/digits_flat")
    assert why_nowhere("runs/digits_flat", "model").endswith("(did you mean 'runs/digits-flat'?)")
    assert why_nowhere("runs/digits-flat", "model") is None


def test_offline_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "HF_HUB_OFFLINE" in why_nowhere("someone/model", "model")


def test_the_hub_is_asked(hub, tmp_path, monkeypatch):
    """Once; what it does not know, it does not have."""
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert "nor a model on the Hub" in why_nowhere("someone/model", "model")
    assert hub.count("GET", "someone/model") == 1


def test_a_network_that_is_none(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        assert why_nowhere("someone/model", "model").endswith("and the Hub cannot be reached")
