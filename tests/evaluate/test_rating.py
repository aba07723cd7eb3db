"""The page for ratings and its server: what is text stays text, votes are kept, other sites are refused."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chinese_llama.errors import BadFile, UserError
from chinese_llama.evaluate.answers import ANSWERS, VOTES, Answered
from chinese_llama.evaluate.rating import CHOICES, LARGEST, Server, Votes, page, shown
from tests.evaluate.rated import write


def records(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / VOTES).read_text(encoding="utf-8").splitlines()]


# --- the page


class Page(HTMLParser):
    """The tags, and the texts of elements of class "text"."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.inside = "text" in (dict(attrs).get("class") or "").split()
        if self.inside:
            self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.texts[-1] += data


@given(
    texts=st.lists(st.text(st.characters(blacklist_categories=("Cs",)), min_size=1), min_size=3, max_size=3)
)
def test_any_text_stays_text(texts: list[str]) -> None:
    answered = Answered(1, texts[0], {"A": texts[1], "B": texts[2]})
    for votes in (None, {1: "first"}):
        parsed = Page(page([answered], {"A": "a", "B": "b"}, 0, votes))
        order = [answered.answers[label] for label in shown(1, "AB", 0)]
        assert parsed.texts == [texts[0], *(text for text in order if text.strip())]
        assert parsed.tags.count("script") == (votes is not None)


def test_the_page_loads_nothing_and_runs_its_own_script_only(tmp_path: Path) -> None:
    votes = Votes(write(tmp_path))
    for drawn in (page(votes.answers, votes.names, 0), votes.page()):
        parsed = Page(drawn)
        assert not {"link", "img", "iframe", "object", "embed", "form", "base"} & set(parsed.tags)
        assert not {"src", "href", "srcset", "action"} & {name for name, _ in parsed.attributes}
        assert not any(name.startswith("on") for name, _ in parsed.attributes)
        assert "url(" not in drawn and "@import" not in drawn
        policy = re.search(r'Content-Security-Policy" content="([^"]*)"', drawn)
        assert policy and policy[1].startswith("default-src 'none'")
        scripts = re.findall(r"<script>(.*?)</script>", drawn, re.S)
        digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
        allowed = [f"'sha256-{digest}'" for digest in digests] or ["'none'"]
        assert f"script-src {allowed[0]};" in policy[1] and len(allowed) == 1


def test_the_page_does_not_say_whose_an_answer_is(tmp_path: Path) -> None:
    answered = [Answered(n, "q", {"A": "1", "B": "2"}) for n in range(1, 9)]
    drawn = page(answered, {"A": "work/merged", "B": "work/control"}, 0)
    assert "work/merged" not in drawn and "work/control" not in drawn
    assert "chinese-llama rate DIR" in drawn
    alone = page([Answered(1, "q", {"A": "1"})], {"A": "work/merged"}, 0)
    assert "work/merged" in alone and "chinese-llama rate" not in alone


def test_the_order_is_drawn_for_each_prompt_by_the_seed() -> None:
    orders = [tuple(shown(number, "AB", 5)) for number in range(400)]
    assert orders == [tuple(shown(number, "AB", 5)) for number in range(400)]
    assert 150 < orders.count(("A", "B")) < 250
    assert orders != [tuple(shown(number, "AB", 6)) for number in range(400)]


# --- votes


def test_a_vote_goes_to_the_model_that_was_shown_there_and_the_last_counts(tmp_path: Path) -> None:
    votes = Votes(write(tmp_path))
    for number in range(1, 6):
        votes.add(number, "first")
    assert votes.last() == {number: shown(number, "AB", 0)[0] for number in range(1, 6)}
    assert set(votes.last().values()) == {"A", "B"}
    for number, choice in ((1, "second"), (2, "tie"), (3, "bad")):
        votes.add(number, choice)
    assert [votes.last()[n] for n in (1, 2, 3)] == [shown(1, "AB", 0)[1], "tie", "bad"]
    assert [(r["number"], r["shown"]) for r in records(tmp_path)][-1] == (3, shown(3, "AB", 0))
    tally = Votes(tmp_path).tally()
    assert (tally["prompts"], tally["of"], tally["ties"], tally["bad"]) == (5, 5, 2, 1)
    assert tally["wins"] + tally["losses"] == 3
    assert "5 of 5 prompts voted on; both bad, which counts as a tie: 1." in votes.told()
    assert Page(votes.page()).attributes.count(("data-vote", "tie")) == 1 + 5  # the vote, the buttons


def test_a_vote_on_a_text_that_was_changed_counts_no_more(tmp_path: Path) -> None:
    votes = Votes(write(tmp_path))
    for number in (1, 2):
        votes.add(number, "first")
    file = tmp_path / ANSWERS
    lines = file.read_text(encoding="utf-8").splitlines()
    first = json.loads(lines[0])
    first["answers"]["B"] += "!"
    file.write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n", encoding="utf-8")
    assert set(Votes(tmp_path).last()) == {2}


def test_a_model_that_is_called_like_a_vote_is_refused(tmp_path: Path) -> None:
    record = {"number": 1, "prompt": "?", "answers": {"A": "x", "tie": "y"}}
    (tmp_path / ANSWERS).write_text(json.dumps(record) + "\n")
    with pytest.raises(BadFile, match="calls a model 'tie', which is a vote"):
        Votes(tmp_path)


def test_no_votes_are_no_rate(tmp_path: Path) -> None:
    assert Votes(write(tmp_path)).told() == "0 of 5 prompts voted on."


def test_answers_of_one_model_have_no_vote(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="of one model, of which none is better; give generate --against"):
        Votes(write(tmp_path, [("x",)]))


@pytest.mark.parametrize(
    "record", [{"number": 9, "vote": "A"}, {"number": 1, "vote": "C"}, {"number": [1], "vote": "A"}, {}]
)
def test_votes_on_other_answers_are_told(record: Any, tmp_path: Path) -> None:
    (write(tmp_path) / VOTES).write_text(json.dumps(record) + "\n")
    with pytest.raises(BadFile, match="a vote that is not about these answers"):
        Votes(tmp_path)


# --- the server


def ask(
    server: Server, method: str = "POST", path: str = "/vote", body: Any = None, **headers: str
) -> tuple[int, str, Any]:
    """(status, text, headers) of a request as the page makes it, but for the headers given."""
    host = f"127.0.0.1:{server.server_port}"
    sent = {"Host": host, "Origin": f"http://{host}"} | headers
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, raw if method == "POST" else None, {k: v for k, v in sent.items() if v})
    response = connection.getresponse()
    return response.status, response.read().decode(), response.headers


def test_a_vote_is_kept_and_shown_when_the_page_is_loaded_again(server: Server, tmp_path: Path) -> None:
    status, before, headers = ask(server, "GET", "/")
    assert status == 200 and 'data-vote="second"' in before and 'data-number="3" data-vote=""' in before
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert ask(server, body={"number": 3, "vote": "second"})[:2] == (200, "kept")
    assert 'data-number="3" data-vote="second"' in ask(server, "GET", "/")[1]
    assert records(tmp_path)[0]["vote"] == shown(3, "AB", 0)[1]
    host = f"localhost:{server.server_port}"
    assert ask(server, body={"number": 3, "vote": "tie"}, Host=host, Origin=f"http://{host}")[0] == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:{port}"}, 403),
        ({"Host": "127.0.0.1"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
        ({"Origin": "https://127.0.0.1:{port}"}, 403),
        ({"Content-Length": str(LARGEST + 1)}, 413),
        ({"Content-Length": "-1"}, 413),
        ({"Content-Length": "x"}, 413),
        ({"Content-Length": "²"}, 413),
    ],
)
def test_other_sites_and_other_bodies_are_refused(
    headers: dict[str, str], status: int, server: Server, tmp_path: Path
) -> None:
    sent = {
        name: value.format(port=server.server_port).encode().decode("latin-1")
        for name, value in headers.items()
    }
    assert ask(server, body={"number": 1, "vote": "tie"}, **sent)[0] == status
    if "Host" in headers:
        assert ask(server, "GET", "/", **sent)[0] == 403
    assert not (tmp_path / VOTES).exists()


NO_VOTES: list[Any] = [
    *(b"", b"x", b"[" * 900, b"\xff", b"[]", b"7"),
    *({"number": 9, "vote": "tie"}, {"number": "1", "vote": "tie"}, {"number": True, "vote": "tie"}),
    *({"number": 1, "vote": "A"}, {"number": 1}, {"number": 1, "vote": []}),
]


@pytest.mark.parametrize("body", NO_VOTES)
def test_what_is_no_vote_is_refused(body: Any, server: Server, tmp_path: Path) -> None:
    assert ask(server, body=body)[:2] == (400, "This is no vote on these answers.")
    assert not (tmp_path / VOTES).exists()


@pytest.mark.parametrize("path", ["/votes.jsonl", "/../votes.jsonl", "/vote", "/?x"])
def test_nothing_else_is_there(path: str, server: Server) -> None:
    assert ask(server, "GET", path)[0] == 404
    if path != "/vote":
        assert ask(server, path=path, body={"number": 1, "vote": "tie"})[0] == 404


def test_votes_that_cannot_be_kept_are_told_to_the_page(server: Server, tmp_path: Path) -> None:
    (tmp_path / VOTES).mkdir()
    status, text, _ = ask(server, body={"number": 1, "vote": "tie"})
    assert status == 500 and "votes.jsonl cannot be written" in text
    (tmp_path / VOTES).rmdir()
    (tmp_path / VOTES).write_text("x\n")
    assert ask(server, "GET", "/")[:1] == (500,)


def test_it_listens_on_this_machine_only_and_a_port_in_use_is_told(server: Server) -> None:
    assert server.socket.getsockname()[0] == "127.0.0.1"
    with pytest.raises(UserError, match=f"port {server.server_port} cannot be used .*; give another --port"):
        Server(server.votes, server.server_port)


def test_a_browser_that_goes_away_leaves_no_traceback(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(5):
        connection = socket.create_connection(("127.0.0.1", server.server_port))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.sendall(f"GET / HTTP/1.0\r\nHost: 127.0.0.1:{server.server_port}\r\n\r\n".encode())
        connection.close()
    assert ask(server, "GET", "/")[0] == 200
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_ends_it_with_the_tally(number: int, tmp_path: Path) -> None:
    Votes(write(tmp_path)).add(1, CHOICES[2])
    code = (
        "import signal, sys\n"
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from chinese_llama.cli_answers import app\n"
        "app(['rate', sys.argv[1], '--port', '0', '--json', sys.argv[1] + '/tally.json'], standalone_mode=False)\n"
        "print('torch' in sys.modules)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert "Vote at http://127.0.0.1:" in process.stdout.readline()
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")
    assert "1 of 5 prompts voted on" in out and "ties: 1." in out
    assert out.endswith("False\n")
    tally = json.loads((tmp_path / "tally.json").read_text())
    assert tally == {"names": {"A": "A", "B": "B"}} | Votes(tmp_path).tally() and tally["ties"] == 1
