"""A local server that speaks OpenAI's protocol, well or badly."""

from __future__ import annotations

import contextlib
import json
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

Reply = Callable[["Request"], None]


class Server(socketserver.ThreadingTCPServer):
    """Answers each POST with what `reply` does; keeps what was asked, and when."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, reply: Reply) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.reply = reply
        self.asked: list[dict[str, Any]] = []
        self.heads: list[dict[str, str]] = []
        self.times: list[float] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients leave those that hang."""


class Request(BaseHTTPRequestHandler):
    """One request: `body` is what was sent."""

    server: Server

    def do_POST(self) -> None:
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(self.body | {"path": self.path})
        self.server.heads.append(dict(self.headers))
        self.server.times.append(time.monotonic())
        self.server.reply(self)

    def do_GET(self) -> None:
        """What a redirect that is followed comes to."""
        self.server.heads.append(dict(self.headers))
        self.say("followed")

    def send(self, status: int, content: str | bytes, **headers: str) -> None:
        raw = content.encode() if isinstance(content, str) else content
        self.send_response(status)
        for name, value in {"Content_Length": str(len(raw)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(raw)

    def say(self, content: Any) -> None:
        """A chat completion with this content."""
        self.send(200, json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}))

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""


@contextlib.contextmanager
def serving(reply: Reply) -> Iterator[Server]:
    with Server(reply) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()


def status(code: int, content: str | bytes = "", **headers: str) -> Reply:
    """Always this status."""
    return lambda request: request.send(code, content, **headers)


def says(content: Any) -> Reply:
    """Always this completion."""
    return lambda request: request.say(content)


def in_turn(*replies: Reply) -> Reply:
    """One after the other, the last for ever."""
    lock, left = threading.Lock(), list(replies)

    def reply(request: Request) -> None:
        with lock:
            now = left.pop(0) if len(left) > 1 else left[0]
        now(request)

    return reply


def hang(request: Request) -> None:
    """Take the request, and say nothing for long."""
    time.sleep(20)


def drip(where: str) -> Reply:
    """A byte now and then, for ever: in the "head", or in the "body"."""

    def reply(request: Request) -> None:
        if where == "body":
            request.send_response(200)
            request.end_headers()
        else:
            request.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        with contextlib.suppress(OSError):
            for _ in range(400):
                request.wfile.write(b"x")
                request.wfile.flush()
                time.sleep(0.05)

    return reply


def close(request: Request) -> None:
    """End the connection without a word."""
    request.connection.close()


def cut(request: Request) -> None:
    """End the connection in the middle of an answer."""
    request.send(200, '{"choices": [', Content_Length="5000")
