"""The client of an OpenAI-compatible endpoint, against a real local server that misbehaves."""

from __future__ import annotations

import email.utils
import json
import re
import socket
import ssl
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from chinese_llama.errors import UserError
from chinese_llama.evaluate.endpoint import Endpoint, Refused, Stopped, _seconds
from tests.evaluate.serving import Reply, close, cut, drip, hang, in_turn, says, serving, status

KEY = "sk-very-secret"
MESSAGES = [{"role": "user", "content": "中国"}]


@pytest.fixture(autouse=True)
def proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that nobody runs: what is on this machine is asked directly, so that no proxy sees the key."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


def endpoint(url: str, **options: Any) -> Endpoint:
    return Endpoint(url, "judge-1", KEY, **{"timeout": 10.0, "retries": 2, "backoff": 0.02, **options})


def error_of(url: str, **options: Any) -> str:
    """The one sentence that asking ends in."""
    with pytest.raises(UserError) as error:
        endpoint(url, **options).ask(MESSAGES)
    told = str(error.value)
    assert KEY not in told and "\n" not in told and told.endswith(".")
    return told


@pytest.mark.parametrize("path", ["", "/", "/chat/completions", "/chat/completions/"])
def test_it_asks_as_the_protocol_has_it(path: str) -> None:
    with serving(says("好")) as server:
        assert endpoint(server.url + path + "?api-version=1").ask(MESSAGES) == "好"
        wanted = {"model": "judge-1", "messages": MESSAGES, "temperature": 0}
        assert server.asked == [wanted | {"path": "/v1/chat/completions?api-version=1"}]
        assert server.heads[0]["Authorization"] == f"Bearer {KEY}"
        assert server.heads[0]["Content-Type"] == "application/json"
        assert server.heads[0]["User-Agent"].startswith("chinese_llama/")


@pytest.mark.parametrize("content", [None, 7, ["x"], {"type": "text"}])
def test_an_answer_without_text_is_empty(content: Any) -> None:
    with serving(says(content)) as server:
        assert endpoint(server.url).ask(MESSAGES) == ""
    for choice in ({}, {"message": None}, 7, None):
        with serving(status(200, json.dumps({"choices": [choice]}))) as server:
            assert endpoint(server.url).ask(MESSAGES) == ""


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("ftp://x/v1", "begins with http:// or https://"),
        ("localhost:8000/v1", "begins with http:// or https://"),
        ("file:///etc/passwd", "begins with http:// or https://"),
        ("http://", "begins with http:// or https://"),
        ("http://a b/", "begins with http:// or https://"),
        ("http://中国/", "begins with http:// or https://"),
        ("", "begins with http:// or https://"),
        ("http://[::1/", "is no URL"),
        ("http://a:99999/", "is no URL"),
        ("http://me:word@host/", "holds a name or password"),
    ],
)
def test_a_wrong_url_is_told(url: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        endpoint(url)
    assert "word@" not in str(error.value)


@pytest.mark.parametrize("key", ["", "  ", "a\nb", "密钥", "a\x00b"])
def test_a_key_that_is_none_is_told(key: str) -> None:
    with pytest.raises(UserError, match="The key is empty or holds characters"):
        Endpoint("http://x", "m", key)


# --- what passes


@pytest.mark.parametrize("fault", [status(500), status(503), status(429), status(408), close, cut])
def test_a_fault_that_passes_is_outlasted(fault: Reply) -> None:
    with serving(in_turn(fault, fault, says("好"))) as server:
        assert endpoint(server.url).ask(MESSAGES) == "好"
        assert len(server.asked) == 3


def test_waits_grow_and_retry_after_is_kept() -> None:
    with serving(in_turn(status(500), status(500), status(500), says("x"))) as server:
        endpoint(server.url, retries=3, backoff=0.1).ask(MESSAGES)
        waits = [then - now for now, then in zip(server.times, server.times[1:], strict=False)]
        assert all(0.05 * 2**n <= wait for n, wait in enumerate(waits)), waits
    with serving(in_turn(status(429, Retry_After="1"), says("x"))) as server:
        endpoint(server.url, backoff=0.001).ask(MESSAGES)
        assert server.times[1] - server.times[0] >= 1
    assert "asks to wait 4,000 s; go on then" in asked(status(429, Retry_After="4000"))


def test_a_date_to_retry_after() -> None:
    then = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 28 <= _seconds(then) <= 30
    assert _seconds(email.utils.formatdate(time.time() - 30, usegmt=True)) == 0
    assert [_seconds(text) for text in ("", "soon", "-1", "12", "1.5", "²")] == [0, 0, 0, 12, 0, 0]


def asked(reply: Reply, tries: int = 1, **options: Any) -> str:
    with serving(reply) as server:
        told = error_of(server.url, **options)
        assert len(server.asked) == tries
        return told


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (
            status(500, "<html>sorry"),
            r"answers 500 \(a web page\) \(3 tries\); the same command goes on later\.",
        ),
        (status(503, '{"error": {"message": "busy\\n now."}}'), r"answers 503 \(busy now\) \(3 tries\)"),
        (close, r"breaks the connection off \(3 tries\)"),
        (cut, r"broke off in the middle of an answer \(3 tries\)"),
        (status(200, ""), r"answers with what is no JSON \(nothing\) \(3 tries\)"),
        (status(200, f"not\x1b json {KEY}"), r"what is no JSON \(not json \*\*\*\)"),
        (status(200, b"\xff\xfe"), "no JSON"),
        (status(200, "[" * 100_000), "no JSON"),
        (status(200, "[]"), "JSON that has no choices"),
        (status(200, '{"choices": []}'), "JSON that has no choices"),
        (status(200, '{"choices": 7}'), "JSON that has no choices"),
        (status(200, '{"error": {"message": "busy"}}'), r"JSON that has no choices \(busy\) \(3 tries\)"),
    ],
)
def test_a_fault_that_stays_is_told_after_all_tries(fault: Reply, told: str) -> None:
    assert re.search(told, asked(fault, tries=3))


@pytest.mark.parametrize("slow", [hang, drip("head"), drip("body")])
def test_a_request_ends_at_its_deadline_even_if_bytes_drip(slow: Reply) -> None:
    start = time.monotonic()
    with serving(slow) as server:
        told = error_of(server.url, timeout=0.4, retries=1)
    assert "gives no whole answer within 0.4 s (2 tries)" in told
    assert 0.8 <= time.monotonic() - start < 15, "the server goes on for 20 s and more"


def test_nobody_there_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        told = error_of(f"http://127.0.0.1:{taken.getsockname()[1]}/v1", retries=1)
    assert "cannot be reached (Connection refused) (2 tries)" in told


def test_a_server_that_accepts_and_never_reads_is_left() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        told = error_of(f"http://127.0.0.1:{deaf.getsockname()[1]}/v1", retries=0, timeout=0.3)
    assert "gives no whole answer within 0.3 s;" in told


# --- what does not pass


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (status(401, json.dumps({"error": {"message": f"bad key {KEY}."}})), "answers 401 (bad key ***): the key is not accepted."),
        (status(403, '{"detail": "no"}'), "answers 403 (no): the key does not allow it."),
        (status(404, '{"message": "no such model"}'), "answers 404 (no such model): the URL or the model is wrong."),
        (status(404), "answers 404: the URL or the model is wrong."),
        (status(418, '{"error": "tea"}'), "answers 418 (tea): it does not take such requests."),
        (status(200, "<!doctype html><p>Hello"), "answers with a web page, not JSON; give the URL of the API"),
        (status(200, "x" * (5 << 20)), "larger than 4 MiB"),
    ],
)  # fmt: skip
def test_what_will_not_pass_is_told_at_once(fault: Reply, told: str) -> None:
    found = asked(fault)
    assert told in found
    assert len(found) < 500


def test_a_model_that_has_a_temperature_of_its_own_is_asked_without_one() -> None:
    def reply(request: Any) -> None:
        if "temperature" in request.body:
            told = {
                "error": {"message": "Unsupported value: 'temperature' does not support 0 with this model."}
            }
            request.send(400, json.dumps(told))
        else:
            request.say("好")

    with serving(reply) as server:
        thinker = endpoint(server.url)
        assert [thinker.ask(MESSAGES) for _ in range(3)] == ["好"] * 3
        assert ["temperature" in asked for asked in server.asked] == [True, False, False, False]


def test_a_refusal_that_only_quotes_the_word_temperature_changes_nothing() -> None:
    filtered = status(400, '{"error": {"message": "filtered: what temperature has it?"}}')
    with serving(in_turn(filtered, filtered, says("好"))) as server:
        judge = endpoint(server.url)
        with pytest.raises(Refused, match="filtered"):
            judge.ask(MESSAGES)
        assert judge.ask(MESSAGES) == "好"
        assert ["temperature" in asked for asked in server.asked] == [True, False, True]


@pytest.mark.parametrize("code", [400, 413, 422])
def test_a_request_that_is_refused_is_not_tried_again(code: int) -> None:
    with serving(status(code, '{"error": {"message": "too long"}}')) as server:
        with pytest.raises(Refused, match=rf"answers {code} \(too long\)"):
            endpoint(server.url).ask(MESSAGES)
        assert len(server.asked) == 1


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_the_key_does_not_follow_a_redirect(code: int) -> None:
    with serving(says("stolen")) as other, serving(status(code, Location=f"{other.url}/x")) as server:
        told = error_of(server.url)
        assert f"answers {code}, a redirect to {other.url}/x, which the key is not sent to" in told
        assert (len(server.heads), other.heads) == (1, [])


def test_a_query_is_not_shown() -> None:
    with serving(status(404)) as server:
        assert "hidden" not in error_of(server.url + "?key=hidden")
        assert server.asked[0]["path"].endswith("?key=hidden")


def test_a_name_that_nobody_has_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nobody)  # no network in tests
    monkeypatch.setenv("no_proxy", "*")
    assert "there is no host of this name" in error_of("http://judge.invalid/v1")


def test_a_host_that_cannot_be_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    assert "is no URL" in error_of("http://a..b/v1")


def test_a_certificate_that_nobody_signed_is_told(tmp_path: Path) -> None:
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -subj /CN=localhost -days 1"
    )
    made = subprocess.run(command.split(), cwd=tmp_path, capture_output=True)
    if made.returncode:
        pytest.skip("no openssl")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with serving(says("x")) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        told = error_of(server.url.replace("http://", "https://"))
    assert "its certificate is not trusted (self-signed certificate" in told


def test_close_ends_a_wait() -> None:
    with serving(status(429, Retry_After="60")) as server:
        waiting = endpoint(server.url)
        threading.Timer(0.2, waiting.close).start()
        start = time.monotonic()
        with pytest.raises(Stopped):
            waiting.ask(MESSAGES)
        assert time.monotonic() - start < 5
