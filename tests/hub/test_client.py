"""What goes wrong on the way to the Hub: the real client against the Hub of the tests, and one line for each fault."""

import hashlib

import pytest

import proxbit
from hub_server import Fault
from proxbit.errors import HubError

PUT = r"/storage/"


def send(folder, repo="me/tiny", **changes):
    return proxbit.push(folder, repo, **changes)


def names(hub):
    return set(hub.hub.repositories["me/tiny"].files()) - {".gitattributes"}


def refused(act, *words):
    """One line that says what to do."""
    with pytest.raises(HubError) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    assert all(word in message for word in words), message


# --- refusals


def test_without_a_token_the_hub_asks_who_it_is(hub, release, monkeypatch):
    hub.sign_in(monkeypatch, None)
    refused(lambda: send(release), "me/tiny was not uploaded", "`hf auth login`", "--token", "(401)")


@pytest.mark.parametrize("repo", ["tiny", "me/tiny"])
def test_a_wrong_token_is_said(hub, release, repo):
    refused(lambda: send(release, repo, token="hf_wrong"), f"{repo} was not uploaded", "`hf auth login`", "(401)")


def test_the_repository_of_another_one_is_not_written_to(hub, release, monkeypatch):
    refused(lambda: send(release, "other/tiny"), "other/tiny was not uploaded: this token may not write there", "(403)")
    send(release)
    hub.sign_in(monkeypatch, "hf_other")
    refused(lambda: send(release), "may not write there")
    hub.hub.repositories["me/tiny"].private = True
    refused(lambda: send(release), "may not write there")


@pytest.mark.parametrize("repo", ["me/a/b", "me/-a b"])
def test_a_name_that_cannot_be_is_said(hub, release, repo):
    refused(lambda: send(release, repo), f"{repo} was not uploaded", "Repo id")


def test_a_branch_that_is_gone_is_said(hub, release):
    hub.faults = [Fault("POST", "/preupload/", status=404)]
    refused(lambda: send(release), "there is no such repository or branch", "(404)")


def test_too_many_requests_are_waited_for(hub, release, waits):
    """Where the client tries again by itself, as long as the Hub says (and a second more)."""
    hub.faults = [Fault("POST", "/objects/batch", status=429, headers={"Retry-After": "7"})]
    send(release)
    assert waits == [8.0] and "model.safetensors" in names(hub)


def test_too_many_requests_where_the_client_gives_up(hub, release):
    hub.faults = [Fault("POST", "/repos/create", status=429, headers={"Retry-After": "7"})]
    refused(lambda: send(release), "too many requests. Run the same again", "(429; wait 7 s)")
    send(release)


# --- failures


@pytest.mark.parametrize("path", ["/preupload/", "/objects/batch", "/complete/"])
def test_one_failure_of_the_hub_goes_unseen(hub, release, waits, path):
    hub.faults = [Fault("POST", path, status=500)]
    send(release)
    assert waits == [1] and "model.safetensors" in names(hub)


@pytest.mark.parametrize("path", ["/repos/create", "/branch/", "/commit/"])
def test_one_failure_of_the_hub_that_the_client_gives_up_at(hub, release, path):
    hub.faults = [Fault("POST", path, status=500)]
    refused(lambda: send(release, revision="next"), "the Hub failed (500). Run the same again: it goes on where it")
    send(release, revision="next")
    assert hub.count("PUT", PUT) == 1


def test_a_dropped_connection_is_tried_again(hub, release, waits):
    hub.faults = [Fault("PUT", PUT, drop=20_000)]
    send(release)
    assert waits == [1] and hub.count("PUT", PUT) == 2


def test_an_interrupted_upload_is_resumed(hub, shards, waits):
    """Two of three pieces arrive; the connection of the third breaks for good, in the middle. Then the same again."""
    largest = max(shards.glob("*.safetensors"), key=lambda file: file.stat().st_size).read_bytes()
    hub.faults = [Fault("PUT", hashlib.sha256(largest).hexdigest(), drop=5_000, times=6)]
    refused(lambda: send(shards), "me/tiny was not uploaded", "Run the same again: it goes on where it stopped")
    assert len(waits) == 5 and len(hub.hub.storage) == 2 and names(hub) == set()
    before = hub.count("PUT", PUT)
    send(shards)
    assert hub.count("PUT", PUT) == before + 1
    pieces = {file.name: file.read_bytes() for file in shards.iterdir()}
    assert pieces.items() <= hub.hub.repositories["me/tiny"].files().items()


def test_offline_nothing_is_uploaded(hub, release, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(lambda: send(release), "offline mode is enabled", "HF_HUB_OFFLINE")
    assert hub.log == []


def test_a_hub_that_is_not_there(hub, release, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    refused(lambda: send(release), "Connection refused", "Run the same again")


def test_a_model_card_that_the_hub_refuses(hub, release):
    """What it says of the metadata is passed on, before the weights are sent."""
    (release / "README.md").write_text("---\nlicense: [mit\n---\n")
    refused(lambda: send(release), "me/tiny was not uploaded: Invalid metadata in README.md", "expected ',' or ']'")
    assert hub.count("PUT", PUT) == 0
