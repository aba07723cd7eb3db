"""Chat completions from any endpoint that speaks OpenAI's protocol: POST {url}/chat/completions.

Every request has a deadline for the whole of it, from the look-up of the name to the last byte. The key is sent in the
Authorization header to that URL only (through the proxy of the environment, unless it is on this machine): redirects
are not followed, and no message holds it.
"""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import http.client
import json
import queue
import random
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any, TypeVar

from chinese_llama import __version__
from chinese_llama.errors import UserError

T = TypeVar("T")
LARGEST = 4 << 20  # bytes of a reply
LONGEST_WAIT = 300.0  # seconds that an endpoint may ask to wait
LOOPBACK = ("localhost", "127.0.0.1", "::1")
PASSING = (408, 409, 425, 429)  # beside 5xx: worth another try
THIS_ONE = (400, 413, 422)  # something in this request, which another may not have
HINTS = {
    401: "the key is not accepted",
    403: "the key does not allow it",
    404: "the URL or the model is wrong",
}


class Refused(Exception):
    """The endpoint does not take this request; others may go."""


class Stopped(Exception):
    """`close` was called while a request waited for its next try."""


class _Passing(Exception):
    """A fault that may pass; `wait`: seconds that the endpoint asks for."""

    def __init__(self, what: str, wait: float = 0.0) -> None:
        super().__init__(what)
        self.wait = wait


class Endpoint:
    """One model behind a URL. `timeout`: seconds for a request; `retries`: further tries; `backoff`: seconds before
    the first of them, doubled for each (with jitter), or longer where the endpoint says so (Retry-After).

    May be asked from several threads. Raises UserError for a URL that is none and a key that no header can hold.
    """

    def __init__(
        self, url: str, model: str, key: str, timeout: float = 120.0, retries: int = 4, backoff: float = 1.0
    ) -> None:
        self.url, self.shown = _completions(url)
        self.model, self.timeout, self.retries, self.backoff = model, timeout, retries, backoff
        self._key = key.strip()
        if not (self._key and self._key.isascii() and self._key.isprintable()):
            raise UserError("The key is empty or holds characters that no key has; look at its variable.")
        host = urllib.parse.urlsplit(self.url).hostname
        direct = (
            [urllib.request.ProxyHandler({})] if host in LOOPBACK else []
        )  # no proxy sees the key of a local server
        self._opener = urllib.request.build_opener(_NoRedirects, *direct)
        self._closed = threading.Event()
        self._own_temperature = False  # models that think take no other

    def ask(self, messages: list[dict[str, str]]) -> str:
        """The answer to `messages`, at temperature 0 where the model takes that; "" where it holds no text. It is as
        it came: what is kept or shown of it goes through `masked`.

        Raises Refused where this request is not taken, and UserError where none will be: a wrong URL or key, no
        endpoint, or a fault that the tries have not outlasted.
        """
        request: dict[str, Any] = {"model": self.model, "messages": messages}
        if not self._own_temperature:
            try:
                return self._tried(request | {"temperature": 0})
            except Refused as error:
                if "temperature" not in str(error):
                    raise
        said = self._tried(request)
        self._own_temperature = True  # not before: a refusal may quote a prompt that holds the word
        return said

    def masked(self, text: str) -> str:
        """A text without the key."""
        return text.replace(self._key, "***")

    def _tried(self, request: dict[str, Any]) -> str:
        body = json.dumps(request).encode()
        for tried in range(self.retries + 1):
            try:
                return _text(self._safe, self.shown, _within(self.timeout, lambda: self._post(body)))
            except _Passing as error:
                if tried == self.retries:
                    tries = f" ({tried + 1} tries)" if tried else ""
                    raise UserError(f"{self.shown} {error}{tries}; the same command goes on later.") from None
                delay = self.backoff * 2**tried * random.uniform(0.5, 1)
                if self._closed.wait(max(delay, error.wait)):
                    raise Stopped from None
        raise AssertionError("a try answers or raises")

    def close(self) -> None:
        """Let requests that wait for their next try give up."""
        self._closed.set()

    def _post(self, body: bytes) -> bytes:
        headers = {
            "Authorization": f"Bearer {self._key}",
            "Content-Type": "application/json",
            "Accept": "application/json",
            "User-Agent": f"chinese_llama/{__version__}",
        }
        request = urllib.request.Request(self.url, body, headers)
        try:
            with self._opener.open(request, timeout=self.timeout + 1) as response:
                return _read(response, self.timeout)
        except urllib.error.HTTPError as error:
            with error:
                raise self._told(error) from None
        except urllib.error.URLError as error:
            raise _unreached(self.shown, error.reason) from None
        except (OSError, http.client.HTTPException) as error:
            raise _unreached(self.shown, error) from None
        except ValueError as error:  # of a host's name
            raise UserError(f"{self.shown} is no URL ({error}).") from None

    def _told(self, error: urllib.error.HTTPError) -> Exception:
        """What an answer that is no success comes to."""
        code, said = error.code, ""
        if not 300 <= code < 400:
            with contextlib.suppress(OSError, http.client.HTTPException):
                said = self._safe(_message(error.read(LARGEST)))
        what = f"answers {code}" + (f" ({said})" if said else "")
        if code in PASSING or code >= 500:
            wait = _seconds(error.headers.get("Retry-After", ""))
            if wait > LONGEST_WAIT:
                return UserError(f"{self.shown} {what} and asks to wait {wait:,.0f} s; go on then.")
            return _Passing(what, wait)
        if code in THIS_ONE:
            return Refused(what)
        if 300 <= code < 400:
            place = self._safe(error.headers.get("Location", "nowhere"))
            return UserError(
                f"{self.shown} answers {code}, a redirect to {place}, which the key is not sent to; give the URL itself."
            )
        return UserError(f"{self.shown} {what}: {HINTS.get(code, 'it does not take such requests')}.")

    def _safe(self, text: str) -> str:
        """A line of what the endpoint says, without the key."""
        line = " ".join("".join(c if c.isprintable() else " " for c in self.masked(text)).split())
        return (line if len(line) <= 200 else line[:200] + " ...").rstrip(".")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _completions(url: str) -> tuple[str, str]:
    """(the URL to post to, the same to show: without its query, which may hold a key)."""
    try:
        parts = urllib.parse.urlsplit(url.strip())
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(f"--url: {url!r} is no URL ({error}).") from error
    if parts.scheme not in ("http", "https") or not host or not re.fullmatch("[!-~]+", url.strip()):
        raise UserError(
            "--url: a URL that begins with http:// or https:// is wanted, such as http://localhost:8000/v1."
        )
    if "@" in parts.netloc:
        raise UserError("--url: it holds a name or password; give the key in the variable of --key-env.")
    path = parts.path.rstrip("/")
    path += "" if path.endswith("/chat/completions") else "/chat/completions"
    whole = parts._replace(path=path, fragment="")
    return whole.geturl(), whole._replace(query="").geturl()


def _within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` returns or raises, if it does so in time. It runs in a thread of its own, which is left behind
    where it hangs: no timeout of a socket ends a server that sends a byte now and then."""
    done: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((work(), None))
        except BaseException as error:
            done.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = done.get(timeout=seconds)
    except queue.Empty:
        raise _Passing(f"gives no whole answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def _read(response: http.client.HTTPResponse, seconds: float) -> bytes:
    """The body of a response; reading ends when nobody waits for it any more."""
    until, parts, size = time.monotonic() + seconds, [], 0
    while block := response.read1(1 << 16):
        parts.append(block)
        size += len(block)
        if size > LARGEST:
            raise UserError(f"The endpoint's answer is larger than {LARGEST >> 20} MiB.")
        if time.monotonic() > until:
            break
    if response.length:  # what was announced and has not come
        raise _Passing("broke off in the middle of an answer")
    return b"".join(parts)


def _text(safe: Callable[[str], str], shown: str, raw: bytes) -> str:
    """The text of the first choice in a reply. What is no reply may pass: gateways give errors with status 200."""
    try:
        reply = json.loads(raw)
    except (ValueError, RecursionError):
        start = safe(raw[:200].decode("utf-8", "replace"))
        if not start.startswith("<"):
            raise _Passing(f"answers with what is no JSON ({start or 'nothing'})") from None
        raise UserError(
            f"{shown} answers with a web page, not JSON; give the URL of the API, such as http://localhost:8000/v1."
        ) from None
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or not choices:
        raise _Passing(f"answers with JSON that has no choices ({safe(_message(raw))})")
    message = choices[0].get("message") if isinstance(choices[0], dict) else None
    content = message.get("content") if isinstance(message, dict) else None
    return content if isinstance(content, str) else ""


def _unreached(shown: str, reason: Any) -> Exception:
    """What a failure below HTTP comes to: a name or a certificate stays wrong, the rest may pass."""
    if isinstance(reason, socket.gaierror) and reason.errno == socket.EAI_NONAME:
        return UserError(f"{shown}: there is no host of this name.")
    if isinstance(reason, ssl.SSLCertVerificationError):
        return UserError(f"{shown}: its certificate is not trusted ({reason.verify_message}).")
    if isinstance(reason, (http.client.HTTPException, ConnectionResetError, BrokenPipeError)):
        return _Passing("breaks the connection off")
    return _Passing(f"cannot be reached ({getattr(reason, 'strerror', None) or reason})")


def _message(raw: bytes) -> str:
    """What a reply says of an error: OpenAI's {"error": {"message"}}, other servers' fields, or its beginning."""
    try:
        reply = json.loads(raw)
    except (ValueError, RecursionError):
        text = raw[:2000].decode("utf-8", "replace")
        return "a web page" if text.lstrip().startswith("<") else text
    error = reply.get("error", reply) if isinstance(reply, dict) else reply
    for name in ("message", "detail"):
        if isinstance(error, dict) and isinstance(error.get(name), str):
            return str(error[name])
    return error if isinstance(error, str) else json.dumps(error, ensure_ascii=False)


def _seconds(retry_after: str) -> float:
    """Seconds of a Retry-After header: a number or a date (RFC 9110, 10.2.3); 0 where there is none."""
    if retry_after.isascii() and retry_after.isdigit():
        return float(retry_after)
    try:
        then = email.utils.parsedate_to_datetime(retry_after)
        then = then if then.tzinfo else then.replace(tzinfo=datetime.timezone.utc)
        return max(0.0, (then - datetime.datetime.now(datetime.timezone.utc)).total_seconds())
    except (ValueError, TypeError, IndexError):
        return 0.0
