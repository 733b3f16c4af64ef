"""The bytes of the images that a request names: data: URLs, base64 text, http and https URLs.

What a client names is fetched by this server, so it could be made to read what the client cannot:
only addresses of the public internet are asked, each connection goes to the very address that was
checked, redirects are checked again, and no file is ever read. Runs in threads of the image desk.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass

from sglang.srt.errors import RequestError

_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_REDIRECTS = 3
_PIECE = 1 << 16
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_AGENT = "sglang"
_KEPT = "/%:@!$&'()*+,;=~-._?"  # of a path or query, as it is in a request


@dataclass(frozen=True)
class FetchRules:
    """Bounds of one image: its file's bytes, and the seconds that fetching it may take.

    `allow_private`: also addresses that are not of the public internet are asked.
    """

    max_bytes: int = 32 << 20
    timeout_s: float = 10.0
    allow_private: bool = False


def read_source(source: str, rules: FetchRules) -> bytes:
    """The file behind a source. Raises RequestError 400 with one sentence; may take seconds."""
    scheme, colon, rest = source.partition(":")
    kind = scheme.lower() if colon else ""
    if kind == "data":
        head, comma, text = rest.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise RequestError("An image's data: URL must be base64.")
        return _decode(text, rules)
    if kind in ("http", "https"):
        return _fetch(source, rules)
    if colon:
        raise RequestError(
            "An image must be an http, https or data: URL or base64 text; files are not read."
        )
    return _decode(source, rules)


def _decode(text: str, rules: FetchRules) -> bytes:
    if len(text) > 4 * rules.max_bytes // 3 + 4:
        raise _too_large(rules)
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(
            "An image is neither a URL nor base64 text (files are not read by the server)."
        ) from None
    if not data:
        raise RequestError("An image is empty.")
    return data


def _fetch(url: str, rules: FetchRules) -> bytes:
    deadline = time.monotonic() + rules.timeout_s
    try:
        for _ in range(_MAX_REDIRECTS + 1):
            with _answer(url, deadline, rules) as answer:
                target = answer.headers.get("Location")
                if answer.status in _REDIRECTS and target:
                    url = urllib.parse.urljoin(url, target)
                    continue
                if answer.status != 200:
                    raise RequestError(f"An image's URL answered with status {answer.status}.")
                return _read(answer, deadline, rules)
    except (OSError, http.client.HTTPException, ValueError) as error:
        why = str(error) or type(error).__name__
        if time.monotonic() >= deadline:
            why = f"it took more than {rules.timeout_s:g} s"
        raise RequestError(f"An image cannot be fetched: {why}.") from None
    raise RequestError(f"An image's URL redirects more than {_MAX_REDIRECTS} times.")


@contextlib.contextmanager
def _answer(url: str, deadline: float, rules: FetchRules) -> Iterator[http.client.HTTPResponse]:
    """The head of what one URL answers; after the deadline its connection is cut."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise RequestError("An image's URL must be http or https, with a host and no password.")
    is_safe = parts.scheme == "https"
    port = parts.port or (443 if is_safe else 80)
    address = _checked_address(parts.hostname, port, rules)
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    connection = http.client.HTTPConnection(parts.hostname, port)
    with contextlib.ExitStack() as stack:
        line = socket.create_connection(address, timeout=left)
        if is_safe:
            context = ssl.create_default_context()
            line = context.wrap_socket(
                line, server_hostname=parts.hostname, do_handshake_on_connect=False
            )
        stack.callback(line.close)
        # A timeout of the socket bounds one read, not a host that sends a byte now and then.
        cut = threading.Timer(max(0.0, deadline - time.monotonic()), _cut, (line,))
        cut.daemon = True
        cut.start()
        stack.callback(cut.cancel)
        if isinstance(line, ssl.SSLSocket):
            line.do_handshake()
        connection.sock = line
        stack.callback(connection.close)
        target = urllib.parse.quote(parts.path or "/", safe=_KEPT)
        if parts.query:
            target += "?" + urllib.parse.quote(parts.query, safe=_KEPT)
        connection.request("GET", target, headers={"Host": parts.netloc, "User-Agent": _AGENT})
        answer = connection.getresponse()
        stack.callback(answer.close)
        yield answer


def _cut(line: socket.socket) -> None:
    """End what is being read or written on another thread."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(line, socket.SHUT_RDWR)  # TLS' own would wait for the other side


def _read(answer: http.client.HTTPResponse, deadline: float, rules: FetchRules) -> bytes:
    found = bytearray()
    while piece := answer.read1(_PIECE):
        found += piece
        if len(found) > rules.max_bytes:
            raise _too_large(rules)
    if time.monotonic() >= deadline:
        raise TimeoutError
    if answer.length:
        raise OSError("the connection ended early")
    return bytes(found)


def _checked_address(host: str, port: int, rules: FetchRules) -> tuple[str, int]:
    """An address of `host`; RequestError 400 when any of them is not to be asked."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses:
        raise OSError("its host has no address")
    if not rules.allow_private and not all(is_public(address) for address in addresses):
        raise RequestError("An image's URL is of a private address, which this server asks not.")
    return addresses[0], port


def is_public(address: str) -> bool:
    """Whether an address is one of the public internet's, whatever it is wrapped in."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            parsed = parsed.ipv4_mapped
        elif parsed.sixtofour or parsed.teredo or parsed in _NAT64:
            return False
    return parsed.is_global and not parsed.is_multicast


def _too_large(rules: FetchRules) -> RequestError:
    return RequestError(f"An image is larger than {rules.max_bytes >> 20} MiB.", 413)
