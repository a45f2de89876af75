"""A small Hub on 127.0.0.1: the protocol of huggingface.co for the real `huggingface_hub`, with faults on demand.

Files of git come from `resolve` directly, large ones by a redirect to the storage, which is another host (`localhost`)
and must never see a token. `connect` leads the client of this process there, `environment` that of a new one.
"""

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from hub_server.protocol import Protocol
from hub_server.repositories import File, Hub, Repository, git_id
from hub_server.transport import Fault, flip_a_bit

__all__ = ["Fault", "File", "Hub", "HubServer", "Repository", "flip_a_bit", "git_id", "running"]


class HubServer:
    """The server. `hub`: what it stores; `log`: the requests so far (method, path, status); `faults`: those to come."""

    def __init__(self, http: ThreadingHTTPServer) -> None:
        self.hub = Hub()
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str, int]] = []
        port = http.server_address[1]
        self.url, self.storage_url = f"http://127.0.0.1:{port}", f"http://localhost:{port}"

    def count(self, method: str, path: str) -> int:
        """How many requests so far were of a method, and of a path in which a regular expression is found."""
        return sum(each == method and re.search(path, where) is not None for each, where, _ in self.log)

    def environment(self, home: Path, token: str | None = None, **more: str) -> dict[str, str]:
        """The environment of a new process whose Hub is this one, with a home of its own."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        own = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        return inherited | own | ({"HF_TOKEN": token} if token else {}) | more

    def connect(self, patch: pytest.MonkeyPatch, home: Path, token: str | None = "hf_me") -> None:
        """Lead the client of this process here: it read its environment when it was imported."""
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "ENDPOINT", self.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        patch.setattr(huggingface_hub.hf_api.api, "endpoint", self.url)
        patch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        self.sign_in(patch, token)

    def sign_in(self, patch: pytest.MonkeyPatch, token: str | None) -> None:
        """Be who has this token; None: nobody."""
        patch.delenv("HF_TOKEN", raising=False) if token is None else patch.setenv("HF_TOKEN", token)


@contextmanager
def running() -> Iterator[HubServer]:
    """A server that runs in a thread."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), Protocol)
    http.daemon_threads = True
    http.site = site = HubServer(http)  # type: ignore[attr-defined]
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        http.shutdown()
        http.server_close()
