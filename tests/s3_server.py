"""A server that speaks S3, on loopback, which counts what is asked for and can fail on demand.

moto keeps the objects. In front of it is a proxy, so that requests are counted as they come over
the wire, and are refused, kept waiting or cut off in the midst.
"""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
moto = pytest.importorskip("moto.server", reason="moto, which speaks S3, is not installed")

PATIENCE = 1.0
"""Seconds that a reader waits for an answer; a busy machine gives one sooner."""
BUCKET = "bucket"
SIGNED = "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request, Signature=0"
REFUSED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


@dataclass(frozen=True)
class Request:
    """One that came over the wire."""

    method: str
    key: str
    range: tuple[int, int] | None
    #: first byte and the one behind the last


@dataclass
class S3:
    """The server, as tests see it."""

    port: int
    requests: list[Request] = field(default_factory=list)
    fault: Callable[[Request], str | None] = lambda request: None
    #: "refuse", "wait", "cut" or None, for each request

    def put(self, key: str, data: bytes | Path) -> str:
        """Store an object, not through the proxy; return its address."""
        body = data.read_bytes() if isinstance(data, Path) else data
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request("PUT", f"/{BUCKET}/{key}", body, {"Authorization": SIGNED})
        answer = connection.getresponse()
        answer.read()
        connection.close()
        assert answer.status == 200, answer.status
        return f"s3://{BUCKET}/{key}"

    def put_folder(self, folder: Path) -> str:
        for path in folder.iterdir():
            self.put(f"{folder.name}/{path.name}", path)
        return f"s3://{BUCKET}/{folder.name}"

    def ranges(self, key: str) -> list[tuple[int, int]]:
        """The ranges that were read of an object, in order."""
        return [r.range for r in self.requests if r.key == key and r.range and r.method == "GET"]


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    s3: S3

    def answer(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length) if length else None
        asked = self.headers.get("Range", "").removeprefix("bytes=")
        first, _, last = asked.partition("-")
        key = self.path.partition("?")[0].removeprefix(f"/{BUCKET}").strip("/")
        request = Request(self.command, key, (int(first), int(last) + 1) if asked else None)
        self.s3.requests.append(request)
        fault = self.s3.fault(request)
        if fault == "wait":
            time.sleep(1.5 * PATIENCE)
        if fault == "refuse":
            self.give(403, {}, b"" if self.command == "HEAD" else REFUSED)
            return
        connection = http.client.HTTPConnection("127.0.0.1", self.s3.port)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        self.give(answer.status, dict(answer.headers), answer.read(), cut=fault == "cut")
        connection.close()

    def give(self, status: int, headers: dict[str, str], body: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        length = headers.get("Content-Length", len(body)) if self.command == "HEAD" else len(body)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        try:
            self.wfile.write(body[: len(body) // 2] if cut else body)
            self.wfile.flush()
        except OSError:
            self.close_connection = True  # who asked has gone
        if cut:
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = answer

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def s3_server() -> Iterator[S3]:
    """Run it, and let fsspec use it for ``s3://``."""
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    s3 = S3(server.get_host_and_port()[1])
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), type("Proxy", (_Proxy,), {"s3": s3}))
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    before = dict(fsspec.config.conf)
    fsspec.config.conf["s3"] = {
        "endpoint_url": f"http://127.0.0.1:{proxy.server_address[1]}",
        "key": "key",
        "secret": "secret",
        "config_kwargs": {
            "read_timeout": PATIENCE,
            "connect_timeout": 5,
            "retries": {"max_attempts": 1},
        },
    }
    s3fs.S3FileSystem.clear_instance_cache()
    s3.put("", b"")  # makes the bucket
    try:
        yield s3
    finally:
        fsspec.config.conf.clear()
        fsspec.config.conf.update(before)
        s3fs.S3FileSystem.clear_instance_cache()
        proxy.shutdown()
        proxy.server_close()
        thread.join()
        server.stop()
