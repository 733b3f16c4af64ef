"""Images from where clients name them, and nothing from where they must not reach."""

from __future__ import annotations

import base64
import contextlib
import http.server
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang.srt.errors import RequestError
from sglang.srt.multimodal import image_source
from sglang.srt.multimodal.image_source import FetchRules, is_public, read_source

OPEN = FetchRules(max_bytes=1000, timeout_s=20.0, allow_private=True)
TEXT = base64.b64encode(b"picture").decode()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers by path."""

    def do_GET(self) -> None:
        path, _, rest = self.path.partition("?")
        bodies = {"/ok": b"picture", "/large": b"x" * 1001, "/empty": b""}
        if path == "/to":
            self.send_response(302)
            self.send_header("Location", rest)
            self.end_headers()
        elif path == "/short":
            self.send_response(200)
            self.send_header("Content-Length", "50")
            self.end_headers()
            self.wfile.write(b"cut")
        elif path in bodies:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(bodies[path])
        else:
            self.send_error(404)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    "source", [TEXT, f"data:image/png;base64,{TEXT}", f"DATA:image/png;charset=x;BASE64,{TEXT}"]
)
def test_texts(source: str) -> None:
    assert read_source(source, FetchRules()) == b"picture"


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("", "empty"),
        ("cat.png", "neither a URL nor base64"),
        ("/etc/passwd", "neither a URL nor base64"),
        ("data:image/png,abc", "must be base64"),
        ("data:image/png;base64", "must be base64"),
        ("file:///etc/passwd", "files are not read"),
        ("ftp://example.com/a.png", "files are not read"),
        ("http://u:p@example.com/", "no password"),
        ("http:///a", "with a host"),
        ("http://127.0.0.1:1/", "private address"),
        ("http://localhost/a", "private address"),
        ("http://[::1]/a", "private address"),
        ("http://[::ffff:10.0.0.1]/a", "private address"),
        ("http://169.254.169.254/latest", "private address"),
        ("http://0x7f000001/", "private address"),
    ],
)
def test_refusals(source: str, named: str) -> None:
    with pytest.raises(RequestError, match=named) as caught:
        read_source(source, FetchRules())
    assert caught.value.http_status == 400


def test_too_long_a_text() -> None:
    with pytest.raises(RequestError, match="larger than") as caught:
        read_source("A" * 1400, OPEN)
    assert caught.value.http_status == 413


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("10.1.2.3", False),
        ("100.64.0.1", False),
        ("192.168.0.1", False),
        ("224.0.0.1", False),
        ("0.0.0.0", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("no address", False),
    ],
)
def test_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_fetching(web: str) -> None:
    assert read_source(f"{web}/ok?a=b c", OPEN) == b"picture"
    assert read_source(f"{web}/to?/ok", OPEN) == b"picture"
    assert read_source(f"{web}/to?/to?{web}/ok", OPEN) == b"picture"


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("/none", "status 404"),
        ("/large", "larger than"),
        ("/short", "ended early"),
        ("/to?/to?/to?/to?/ok", "more than 3 times"),
        ("/to?file:///etc/passwd", "must be http or https"),
    ],
)
def test_answers_that_are_no_image(web: str, path: str, named: str) -> None:
    with pytest.raises(RequestError, match=named):
        read_source(web + path, OPEN)


def test_a_redirect_is_checked_again(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def checked(host: str, port: int, rules: FetchRules) -> tuple[str, int]:
        asked.append(host)
        if len(asked) > 1:
            raise RequestError("private")
        return "127.0.0.1", port

    monkeypatch.setattr(image_source, "_checked_address", checked)
    target = web.replace("127.0.0.1", "localhost")
    with pytest.raises(RequestError, match="private"):
        read_source(f"{web}/to?{target}/ok", OPEN)
    assert asked == ["127.0.0.1", "localhost"]


def test_a_name_with_a_private_address_among_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(*_: Any, **__: Any) -> list[Any]:
        return [(0, 0, 0, "", ("8.8.8.8", 80)), (0, 0, 0, "", ("10.0.0.1", 80))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(RequestError, match="private address"):
        read_source("http://rebinding.test/a.png", FetchRules())


def test_a_host_that_never_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/a.png"
        with pytest.raises(RequestError, match=r"took more than 0\.1 s"):
            read_source(url, FetchRules(timeout_s=0.1, allow_private=True))


def test_a_host_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with pytest.raises(RequestError, match=r"cannot be fetched: .*refused"):
        read_source(f"http://127.0.0.1:{port}/", OPEN)


@pytest.fixture
def safe_web(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A server that speaks TLS with a certificate of its own, and that certificate's file."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    command += ["-nodes", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command, *files], check=True, capture_output=True)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"https://localhost:{server.server_address[1]}", certificate
    server.shutdown()
    server.server_close()
    thread.join()


def test_https(safe_web: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    url, certificate = safe_web
    with pytest.raises(RequestError, match=r"cannot be fetched: .*certificate"):
        read_source(f"{url}/ok", OPEN)
    known = ssl.create_default_context(cafile=str(certificate))
    monkeypatch.setattr(ssl, "create_default_context", lambda: known)
    assert read_source(f"{url}/ok", OPEN) == b"picture"
    with pytest.raises(RequestError, match=r"cannot be fetched: .*(mismatch|not valid)"):
        read_source(f"{url.replace('localhost', '127.0.0.1')}/ok", OPEN)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_host_that_sends_a_little_now_and_then(scheme: str) -> None:
    """Each byte comes in time, the whole does not."""
    ended = threading.Event()

    def drip(listener: socket.socket) -> None:
        line, _ = listener.accept()
        with line, contextlib.suppress(OSError):
            while not ended.wait(0.02):
                line.sendall(b"H" if scheme == "http" else b"\x16\x03\x03\xff\xff")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=(listener,))
        thread.start()
        url = f"{scheme}://127.0.0.1:{listener.getsockname()[1]}/a.png"
        with pytest.raises(RequestError, match="cannot be fetched"):
            read_source(url, FetchRules(timeout_s=0.2, allow_private=True))
        ended.set()
        thread.join()
