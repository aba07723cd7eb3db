"""Answers to read and to rate: one HTML page that needs no network, and a server on this machine for the votes.

The page shows the two answers to a prompt in an order that is drawn for each prompt and does not say whose they are.
Votes are lines of votes.jsonl: {"number", "vote": a model's label, "tie" or "bad", "shown": labels in the order of the
page, "digest": of the texts, "at"}; the last vote for a prompt counts, as long as its texts are those voted on.

The server listens on 127.0.0.1 only and refuses requests whose Host or Origin is another site's (DNS rebinding,
cross-site requests); whoever can run programs on this machine can still vote.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
import socketserver
import sys
from collections import Counter
from collections.abc import Sequence
from functools import cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from chinese_llama.artifacts import now
from chinese_llama.errors import BadFile, UserError
from chinese_llama.evaluate.answers import ANSWERS, VOTES, Answered, read_answers
from chinese_llama.evaluate.lines import append_line, read_lines
from chinese_llama.evaluate.wins import told, win_rate

TEMPLATE = Path(__file__).parent / "rating.html"
CHOICES = ("first", "second", "tie", "bad")
LARGEST = 1024  # bytes of a vote
PATIENCE = 20  # seconds that a browser may take for a request


def shown(number: int, labels: Sequence[str], seed: int) -> list[str]:
    """The labels in the order in which the page shows their answers to prompt `number`."""
    order = list(labels)
    random.Random(f"{seed} {number}").shuffle(order)
    return order


def page(
    answers: Sequence[Answered], names: dict[str, str], seed: int, votes: dict[int, str] | None = None
) -> str:
    """The page of answers by the models in `names` ({label: name}), which are named if there is one only.

    `votes` ({number: one of CHOICES}): the page as the server gives it, to vote on. Prompts and answers are text,
    whatever they hold: the template escapes, and the page's policy runs its own script only.
    """
    items = [
        {"number": a.number, "prompt": a.prompt, "answers": [a.answers[x] for x in shown(a.number, list(names), seed)]}
        for a in answers
    ]  # fmt: skip
    drawn: str = _template().render(
        items=items, names=list(names.values()), votes=votes, voting=votes is not None
    )
    script = re.search(r"<script>(.*?)</script>", drawn, re.S)
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode() if script else ""
    return drawn.replace("SCRIPT-SOURCE", f"'sha256-{digest}'" if digest else "'none'", 1)


@cache
def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def _digest(answered: Answered) -> str:
    """Names the texts that a vote is about."""
    texts = [answered.prompt, *sorted(answered.answers.items())]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


class Votes:
    """What people say of the answers in a directory. Raises BadFile where they are of one model, or damaged."""

    def __init__(self, directory: Path) -> None:
        self.file = Path(directory) / VOTES
        self.answers, self.names, self.seed = read_answers(directory)
        if len(self.names) != 2:
            what = "holds the answers of one model, of which none is better; give generate --against too."
            raise BadFile(Path(directory) / ANSWERS, what)
        if taken := set(self.names) & {"tie", "bad"}:
            raise BadFile(
                Path(directory) / ANSWERS, f"calls a model {taken.pop()!r}, which is a vote; rename it."
            )
        self.digests = {answered.number: _digest(answered) for answered in self.answers}
        self.last()

    def last(self) -> dict[int, str]:
        """{number: label, "tie" or "bad"}."""
        votes: dict[int, str] = {}
        for record in read_lines(self.file):
            number: Any = record.get("number")
            vote = record.get("vote")
            known = type(number) is int and number in self.digests
            if not known or vote not in (*self.names, "tie", "bad"):
                raise BadFile(
                    self.file, f"holds a vote that is not about these answers ({number!r}: {vote!r})."
                )
            if record.get("digest") == self.digests[number]:  # else it is about other texts
                votes[number] = vote
        return votes

    def add(self, number: int, choice: str) -> None:
        """Keep a vote for what the page shows first, second, neither."""
        order = shown(number, list(self.names), self.seed)
        vote = dict(zip(CHOICES, order, strict=False)).get(choice, choice)
        digest = self.digests[number]
        append_line(
            self.file, {"number": number, "vote": vote, "shown": order, "digest": digest, "at": now()}
        )

    def page(self) -> str:
        """The page to vote on, with the votes so far."""
        choices = {}
        for number, vote in self.last().items():
            order = shown(number, list(self.names), self.seed)
            choices[number] = CHOICES[order.index(vote)] if vote in order else vote
        return page(self.answers, self.names, self.seed, choices)

    def tally(self) -> dict[str, Any]:
        """The `win_rate` of the first model over the second, "bad" (votes that both are, which are ties) and "of",
        the number of prompts."""
        count = Counter(self.last().values())
        first, second = self.names
        rate = win_rate(count[first], count[second], count["tie"] + count["bad"])
        return {**rate, "bad": count["bad"], "of": len(self.digests)}

    def told(self) -> str:
        """The tally in words."""
        tally = self.tally()
        votes = f"{tally['prompts']} of {tally['of']} prompts voted on"
        if not tally["prompts"]:
            return f"{votes}."
        return f"{votes}; both bad, which counts as a tie: {tally['bad']}.\n{told(tally, self.names)}"


class Server(ThreadingHTTPServer):
    """The page and its votes on 127.0.0.1. Raises UserError where the port is taken; 0 takes any free one."""

    daemon_threads = True

    def __init__(self, votes: Votes, port: int) -> None:
        self.votes = votes
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            raise UserError(
                f"port {port} cannot be used ({error.strerror}); give another --port, or 0."
            ) from error
        self.hosts = {f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")}
        self.url = f"http://127.0.0.1:{self.server_port}/"

    def server_bind(self) -> None:
        """Without http.server's look-up of the machine's name, which may wait for a name server."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "localhost", self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away is nothing to tell of."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """GET / is the page; POST /vote takes {"number": 3, "vote": one of CHOICES}."""

    server: Server
    server_version, sys_version = "chinese-llama", ""
    timeout = PATIENCE

    def do_GET(self) -> None:
        if self._refused(self.path == "/"):
            return
        try:
            self._send(HTTPStatus.OK, self.server.votes.page(), "text/html")
        except UserError as error:
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))

    def do_POST(self) -> None:
        if self._refused(self.path == "/vote"):
            return
        if self.headers.get("Origin") not in {f"http://{host}" for host in self.server.hosts}:
            self._send(HTTPStatus.FORBIDDEN, "Votes come from this server's own page.")
            return
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit() and int(length) <= LARGEST):
            self._send(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"A vote has at most {LARGEST} bytes.")
            return
        try:
            vote = json.loads(self.rfile.read(int(length)))
            number, choice = vote["number"], vote["vote"]
            known = type(number) is int and number in self.server.votes.digests and choice in CHOICES
        except (ValueError, TypeError, KeyError, RecursionError):
            known = False
        if not known:
            self._send(HTTPStatus.BAD_REQUEST, "This is no vote on these answers.")
            return
        try:
            self.server.votes.add(number, choice)
            self._send(HTTPStatus.OK, "kept")
        except UserError as error:
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))

    def _refused(self, known: bool) -> bool:
        """Whether the request is for another site, or for what is not here; then it is answered."""
        if self.headers.get("Host") not in self.server.hosts:
            self._send(HTTPStatus.FORBIDDEN, f"This is {self.server.url}, and no other site.")
            return True
        if not known:
            self._send(HTTPStatus.NOT_FOUND, "There is nothing here.")
        return not known

    def _send(self, status: HTTPStatus, text: str, kind: str = "text/plain") -> None:
        body = text.encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
            "Content-Security-Policy": "frame-ancestors 'none'",
            "Cross-Origin-Resource-Policy": "same-origin",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing of each request."""


def serve(directory: Path, port: int) -> None:
    """Serve the page of a directory of answers until Ctrl-C. Raises UserError."""
    votes = Votes(directory)
    with Server(votes, port) as server:
        try:
            print(f"Vote at {server.url} (votes are kept in {votes.file}; Ctrl-C ends this)", flush=True)
            server.serve_forever()
        except KeyboardInterrupt:
            print()
