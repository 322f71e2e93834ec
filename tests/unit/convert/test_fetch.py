"""Downloads against a server on this machine: whole, resumed, without ranges, wrong, absent, broken off."""

import email.message
import hashlib
import io
import re
import threading
import urllib.request
import urllib.response
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ldm.convert import fetch
from ldm.convert.fetch import Published
from ldm.registry import ConfigError

LIST = Path(__file__).resolve().parents[3] / "checkpoints" / "weights.yaml"
DATA = bytes(range(256)) * 40
SHA = hashlib.sha256(DATA).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves DATA; the path says how."""

    def do_GET(self) -> None:
        server: Any = self.server
        span = self.headers.get("Range")
        server.asked.append((self.path, span))
        if self.path == "/absent":
            self.send_error(404)
        elif self.path == "/away":
            self.send_response(302)
            self.send_header("Location", "http://example.com/x")
            self.end_headers()
        elif self.path == "/busy" and len(server.asked) < 3:
            self.send_error(503)
        else:
            self._send(int(span[6:-1]) if span and self.path != "/plain" else 0)

    def _send(self, start: int) -> None:
        body = DATA[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(DATA) - 1}/{len(DATA)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:4000] if self.path == "/broken" else body)

    def log_message(self, format: str, *args: Any) -> None:
        """Be silent."""


@pytest.fixture
def server() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def entry(server: Any, path: str, **changes: Any) -> dict[str, Published]:
    url = f"http://127.0.0.1:{server.server_port}{path}"
    return {"x": replace(Published(url, len(DATA), SHA, "none", "original", "none", "x.bin"), **changes)}


def get(entries: dict[str, Published], out: Path, **options: Any) -> bytes:
    return fetch.fetch("x", entries, out, wait=0.0, **options).read_bytes()


def refused(entries: dict[str, Published], out: Path, said: str, **options: Any) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        get(entries, out, **options)
    assert "\n" not in str(caught.value) and not (out / "x.bin").exists()


def test_a_file_is_downloaded_once(server: Any, tmp_path: Path) -> None:
    assert get(entry(server, "/file"), tmp_path / "new") == DATA
    assert get(entry(server, "/file"), tmp_path / "new") == DATA
    assert server.asked == [("/file", None)]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["x.bin"]


def test_a_part_is_continued(server: Any, tmp_path: Path) -> None:
    (tmp_path / "x.bin.part").write_bytes(DATA[:700])
    assert get(entry(server, "/file"), tmp_path) == DATA
    assert server.asked == [("/file", "bytes=700-")]


def test_an_unknown_size_is_the_servers(server: Any, tmp_path: Path) -> None:
    (tmp_path / "x.bin.part").write_bytes(DATA[:700])
    assert get(entry(server, "/file", size=None), tmp_path) == DATA
    assert get(entry(server, "/broken", size=None), tmp_path / "broken") == DATA
    assert [span for _, span in server.asked] == ["bytes=700-", None, "bytes=4000-", "bytes=8000-"]


def test_a_broken_connection_is_taken_up_again(server: Any, tmp_path: Path) -> None:
    assert get(entry(server, "/broken"), tmp_path) == DATA
    assert [span for _, span in server.asked] == [None, "bytes=4000-", "bytes=8000-"]


def test_a_server_without_ranges_starts_afresh(server: Any, tmp_path: Path) -> None:
    (tmp_path / "x.bin.part").write_bytes(b"z" * 700)
    assert get(entry(server, "/plain"), tmp_path) == DATA


def test_a_busy_server_is_asked_again(server: Any, tmp_path: Path) -> None:
    assert get(entry(server, "/busy"), tmp_path) == DATA
    assert len(server.asked) == 3


def test_another_content_is_not_kept(server: Any, tmp_path: Path) -> None:
    refused(entry(server, "/file", sha256="0" * 64), tmp_path, f"has sha256 {SHA}, must be 0+: deleted; ask the")
    assert not list(tmp_path.iterdir())
    (tmp_path / "x.bin.part").write_bytes(b"z" * 700)  # a part of another file
    refused(entry(server, "/file"), tmp_path, "has sha256 .* must be .*: deleted")
    refused(entry(server, "/file", size=9), tmp_path, f"has {len(DATA)} bytes, must be 9: it was replaced")


def test_an_absent_file_is_said_at_once(server: Any, tmp_path: Path) -> None:
    refused(entry(server, "/absent"), tmp_path, r"/absent is not there \(answer 404\); download it in a browser")
    assert len(server.asked) == 1


def test_an_unknown_hash_wants_the_publishers(server: Any, tmp_path: Path) -> None:
    unknown = entry(server, "/file", sha256=None)
    refused(unknown, tmp_path, "no sha256 is known, and an unchecked file is not kept; give .* --sha256 HEX")
    refused(unknown, tmp_path, "sha256 is 'abc', must be 64 hexadecimal digits", sha256="abc")
    refused(entry(server, "/file"), tmp_path, "--sha256 is 0+, the list has", sha256="0" * 64)
    assert not server.asked
    assert get(unknown, tmp_path, sha256=SHA.upper()) == DATA


def test_another_file_of_that_name_is_left_alone(server: Any, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="exists and is another file than 'x'; move it away"):
        get(entry(server, "/file"), tmp_path)
    assert (tmp_path / "x.bin").read_bytes() == b"mine" and not server.asked


def test_only_https_leaves_this_machine(server: Any, tmp_path: Path) -> None:
    refused(entry(server, "", url="http://example.com/x"), tmp_path, "address is http://example.com/x, must be https")
    refused(entry(server, "", url="file:///etc/passwd"), tmp_path, "must be https")
    refused(entry(server, "/away"), tmp_path, "address is http://example.com/x, must be https")


def test_https_is_never_left_again(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = f"http://127.0.0.1:{server.server_port}/file"

    def https_open(_: Any, request: urllib.request.Request) -> urllib.response.addinfourl:
        headers = email.message.Message()
        headers["Location"] = {"/down": local, "/on": "https://a.example/down"}[request.selector]
        answer: Any = urllib.response.addinfourl(io.BytesIO(), headers, request.full_url, 302)
        answer.msg = "Found"
        return answer

    monkeypatch.setattr(urllib.request.HTTPSHandler, "https_open", https_open)
    for path in ("/down", "/on"):
        said = f"https://a.example/down sends on to {local}, must stay https; download it in a browser"
        refused(entry(server, "", url=f"https://a.example{path}"), tmp_path, said)
    assert not server.asked


def test_no_room_and_no_answer_are_said(server: Any, tmp_path: Path) -> None:
    refused(entry(server, "/file", size=10**16), tmp_path, r"GB free, x.bin needs 10000000\.0 GB more; make room")
    gone = entry(server, "/file")
    server.server_close()
    refused(gone, tmp_path, r"failed 6 times .*0 of 10240 bytes are in .*x.bin.part: run the same command again")


def test_the_list_is_whole() -> None:
    entries = fetch.published(LIST)
    assert {"sd15", "sd15-inpainting", "sd21-base", "sd21", "sdxl-base", "sdxl-vae-fp16-fix"} <= entries.keys()
    kinds = Counter(name.partition("-")[0] for name in entries)
    assert (kinds["controlnet"], kinds["t2i"], kinds["coadapter"], kinds["ip"]) == (14, 18, 6, 9)
    assert len({item.stored for item in entries.values()}) == len(entries)  # none is stored over another
    for item in entries.values():
        assert item.url.startswith("https://") and item.stored.endswith((".safetensors", ".ckpt", ".pth"))
        assert item.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", item.sha256)
        assert all((LIST.parents[1] / path).is_file() for path in re.findall(r"configs/\S+", item.config))
    with pytest.raises(ConfigError, match=r"no published file 'sd5'; known: sd15, .*did you mean 'sd15'"):
        fetch.fetch("sd5", entries, Path())


def test_a_wrong_list_is_said(tmp_path: Path) -> None:
    (tmp_path / "weights.yaml").write_text("x: {url: https://a/b}")
    with pytest.raises(ConfigError, match=r"weights.yaml: x: .*missing keys \['config', 'layout', 'licence', 'sha256'"):
        fetch.published(tmp_path / "weights.yaml")


def test_a_name_that_leaves_the_folder_is_refused() -> None:
    for name in ("../x.safetensors", "a/b", ".."):
        with pytest.raises(ConfigError, match="must be a plain file name"):
            fetch.Published("https://example.org/x", 1, None, "MIT", "original", "x.yaml", name)
