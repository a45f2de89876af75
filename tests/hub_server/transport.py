"""HTTP of the Hub of the tests: requests with bodies, answers, refusals, and what goes wrong on the way."""

import json
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlsplit

__all__ = ["Fault", "Refusal", "Transport", "flip_a_bit"]


def flip_a_bit(data: bytes) -> bytes:
    """The same bytes with one wrong bit in the middle."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@dataclass
class Fault:
    """What goes wrong with requests that match, instead of serving them, or while they are served.

    Args:
        method, path: a method, and a regular expression that is searched in the path.
        status, headers: answered instead of the right answer.
        drop: the connection is closed after so many bytes of the body were read (uploads) or written (downloads).
        corrupt: what is sent instead of the body, as a function of it; of the same size.
        times: how often.
    """

    method: str
    path: str
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    drop: int | None = None
    corrupt: Callable[[bytes], bytes] | None = None
    times: int = 1

    def meets(self, method: str, path: str) -> bool:
        """Whether a request meets this fault, which is then used up by one."""
        met = self.times > 0 and self.method == method and re.search(self.path, path) is not None
        self.times -= met
        return met


class Refusal(Exception):
    """An answer that is an error; the code is as the Hub names it."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        named = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.status, self.message, self.headers = status, message, named | dict(headers or {})


class Transport(BaseHTTPRequestHandler):
    """A connection of one client. `self.server.site` is the `HubServer`; `route` is what a request leads to."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Nothing on the terminal; `HubServer.log` holds the requests."""

    def serve(self) -> None:
        """Serve one request."""
        self.site = self.server.site
        self.url = urlsplit(self.path)
        self.fault = next((fault for fault in self.site.faults if fault.meets(self.command, self.url.path)), None)
        body = self.read_body()
        if body is None:
            return
        try:
            if self.fault is not None and self.fault.status is not None:
                raise Refusal(self.fault.status, "Out of order", headers=self.fault.headers)
            self.route(body)
        except Refusal as refusal:
            self.send(refusal.status, json.dumps({"error": refusal.message}).encode(), refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def route(self, body: bytes) -> None:
        """Answer the request."""
        raise NotImplementedError

    def read_body(self) -> bytes | None:
        """The body of the request, or None if the connection was dropped meanwhile."""
        length = int(self.headers.get("Content-Length") or 0)
        if self.fault is None or self.fault.drop is None or length == 0:
            return self.rfile.read(length)
        self.rfile.read(min(self.fault.drop, length - 1))
        self.note(0)
        self.hang_up()
        return None

    def send(self, status: int, data: bytes, headers: Mapping[str, str]) -> None:
        """Send an answer, damaged if there is such a fault."""
        self.note(status)
        fault = self.fault
        if fault is not None and fault.corrupt is not None:
            data = fault.corrupt(data)
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is not None and fault.drop is not None:
            self.wfile.write(data[: fault.drop])
            self.wfile.flush()
            self.hang_up()
        else:
            self.wfile.write(data)

    def answer(self, content: object, status: int = 200) -> None:
        """Send JSON."""
        self.send(status, json.dumps(content).encode(), {})

    def note(self, status: int) -> None:
        self.site.log.append((self.command, self.url.path, status))

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)
