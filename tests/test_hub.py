"""Hub ids are told from paths, and nothing else reaches for the network."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from typing import Any, ClassVar

import pytest

from chinese_llama.errors import UserError
from chinese_llama.hub import is_hub_id, local


@pytest.mark.parametrize("place", ["hfl/chinese-llama-plus-lora-7b", "a-b/c.d_e", "0x/y"])
def test_hub_ids(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(place)


@pytest.mark.parametrize(
    "place", ["name", "/a/b", "./a", "../a", "~/a", "a/b/c", "a/", "", ".a/b", "a b/c", "模型/x y"]
)
def test_paths_are_no_hub_ids(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id(place)
    assert local(place) == Path(place)


def test_a_directory_that_is_here_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A typing error in work/x must not become a download."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id("work/missing")
    assert local("work/missing") == Path("work/missing")


def test_a_hub_that_does_not_answer_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(
        UserError, match=r"^nobody/nothing is no directory here, and the hub .*\)\.$"
    ) as error:
        local("nobody/nothing")
    assert "\n" not in str(error.value)


FILES = {"zh/a.jsonl": b'{"text": "\xe4\xb8\x80"}\n', "zh/sub/b.parquet": b"P", "en/c.txt": b"two\n"}
OTHERS = {"README.md": b"#", "zh/picture.png": b"png"}
COMMIT = "0" * 40
LIST = """
import sys
from chinese_llama.data.mixture import sources
from chinese_llama.errors import report

def main(words):
    (source,) = sources({"path": "user/wiki", "files": words[0] if words else None})
    for file in source.list_files():
        print(file, file.read_bytes())

sys.exit(report(main, sys.argv[1:]))
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a download of the dataset user/wiki needs (https://huggingface.co/docs/hub/api)."""

    fetched: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self._answer(False)

    def do_GET(self) -> None:
        self._answer(True)

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        everything = {**FILES, **OTHERS}
        name = path.removeprefix(f"/datasets/user/wiki/resolve/{COMMIT}/")
        if path.startswith("/api/datasets/user/wiki/revision/"):
            body = json.dumps({"id": "user/wiki", "sha": COMMIT, "siblings": []}).encode()
        elif path.startswith("/api/datasets/user/wiki/tree/"):
            entries = everything.items()
            listed = [{"type": "file", "path": n, "size": len(raw), "oid": n} for n, raw in entries]
            body = json.dumps(listed).encode()
        elif name in everything:
            body = everything[name]
            self.fetched += [name] * with_body
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{zlib.crc32(body)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


def test_of_a_dataset_only_the_files_that_are_asked_for_are_downloaded(tmp_path: Path) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    online = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}

    def listed(*pattern: str, **environment: str) -> tuple[dict[str, str], str]:
        names = {**os.environ, "HF_HOME": str(tmp_path / "home"), **environment}
        command = [sys.executable, "-c", LIST, *pattern]
        done = subprocess.run(command, cwd=tmp_path, env=names, text=True, capture_output=True)
        found = [line.split(" ", 1) for line in done.stdout.splitlines()]
        return {place.partition(f"{COMMIT}/")[2]: content for place, content in found}, done.stderr

    try:
        chosen = listed("zh/**/*.jsonl", **online)[0]
        assert chosen == {"zh/a.jsonl": str(FILES["zh/a.jsonl"])} and Hub.fetched == ["zh/a.jsonl"]
        _, told = listed(HF_HUB_OFFLINE="1")
        assert told.startswith("Error: user/wiki is no dataset here, and the hub does not give it (")
        assert told.count("\n") == 1, "what is there is not taken for the whole"
        assert listed(**online)[0] == {name: str(raw) for name, raw in FILES.items()}
        assert sorted(Hub.fetched) == sorted(FILES), "each once, and no other"
    finally:
        server.shutdown()
    assert listed("zh/*.jsonl", HF_HUB_OFFLINE="1")[0] == chosen


@pytest.mark.parametrize("place", ["dta/zh.jsonl", "dta/zh.jsonl.gz", "dta/zh.parquet", "dta/zh.txt"])
def test_a_mistyped_file_is_no_hub_id(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked of the network for it."""
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id(place)
