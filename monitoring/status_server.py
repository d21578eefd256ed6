"""/health, /ready and /metrics of a process that has no HTTP server of its own."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from protocol.errors import ConfigError


class Readiness(NamedTuple):
    """ready: may be given work. state: "ok", "starting" or "degraded"; a degraded service is still ready."""

    ready: bool
    state: str
    reason: str = ""


class StatusServer:
    """An HTTP server on a thread of its own. `readiness` is called from that thread and must not block."""

    def __init__(self, host: str, port: int, registry: CollectorRegistry, readiness: Callable[[], Readiness]) -> None:
        """Raises ConfigError: the port is in use. Port 0 takes any; see `port`."""

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 10

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path == "/metrics":
                    self._answer(200, CONTENT_TYPE_LATEST, generate_latest(registry))
                elif path in ("/health", "/ready"):
                    now = readiness()
                    status = 200 if path == "/health" or now.ready else 503
                    body = json.dumps({"ready": now.ready, "state": now.state, "reason": now.reason})
                    self._answer(status, "application/json", body.encode())
                else:
                    self._answer(404, "text/plain", b"not found\n")

            def _answer(self, status: int, content_type: str, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Scrapes are not news."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True

        try:
            self._server = Server((host, port), Handler)
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}", param="metrics_port") from error
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, name="status", daemon=True)
        self._thread.start()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # where only a connected socket can be shut down
            self._server.socket.shutdown(socket.SHUT_RDWR)  # wakes the thread, which looks twice a second else
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(2.0)
