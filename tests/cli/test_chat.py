"""`cachedattention chat`: against the whole system, and against servers that misbehave."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from cli.chat import Conversation, events, printable, summary
from inference.embedded.small_talk import SUGGESTION
from protocol.errors import PeerError
from tests.cli.running import PATIENCE_S, Up, cli, environment, running_up

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with running_up(tmp_path_factory.mktemp("chat") / "data") as running:
        yield running


def chat(url: str, *lines: bytes, more: tuple[str, ...] = ()) -> tuple[int, str, str]:
    done = cli("chat", "--url", url, "--max-tokens", "6", *more, stdin=b"\n".join(lines) + b"\n")
    return done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")


def test_a_piped_conversation_shows_what_was_cached(up: Up) -> None:
    """And what was said: it reads like one at a terminal."""
    code, out, _ = chat(up.url, b"Hello.", b"", b"And then?", b"/quit", b"never asked")
    assert code == 0
    assert [line for line in out.splitlines() if line.startswith("› ")] == ["› Hello.", "› And then?", "› /quit"]
    lines = [line for line in out.splitlines() if line.startswith("cached ")]
    assert len(lines) == 2
    assert lines[0].startswith("cached 0 of ")
    assert not lines[1].startswith("cached 0 of ")
    assert all("TTFT" in line and "computed" in line for line in lines)


def test_a_terminal_is_told_what_to_say(up: Up) -> None:
    """At a terminal the embedded model's chat opens with a suggestion."""
    terminal, theirs = pty.openpty()
    try:
        with subprocess.Popen(
            [sys.executable, "-m", "cli", "chat", "--url", up.url],
            stdin=theirs,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment(),
        ) as process:
            os.write(terminal, b"/quit\n")
            out, _ = process.communicate(timeout=PATIENCE_S)
    finally:
        os.close(terminal)
        os.close(theirs)
    assert process.returncode == 0
    assert out.decode().splitlines()[1] == f"try: {SUGGESTION}"


def test_the_conversation_of_the_readme(tmp_path: Path) -> None:
    """What the README shows is what a newcomer sees, but for the times."""
    shown = re.search(r"^```\n(› .*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert shown is not None
    said = [line.removeprefix("› ") for line in shown[1].splitlines() if line.startswith("› ")]
    assert said[0] == SUGGESTION
    with running_up(tmp_path / "data") as fresh:
        done = cli("chat", "--url", fresh.url, stdin="\n".join(said).encode())
    times = re.compile(r"TTFT [\d,]+ ms")
    assert times.sub("", done.stdout.decode()) == times.sub("", shown[1])


def test_new_and_system_begin_again(up: Up) -> None:
    code, out, _ = chat(up.url, b"/system Be brief.", b"One.", b"/new", b"One.", b"/what", b"/new")
    assert code == 0
    assert len([line for line in out.splitlines() if line.startswith("a new conversation")]) == 3
    assert "/quit leaves" in out
    prompts = [line.split(" of ")[1].split()[0] for line in out.splitlines() if line.startswith("cached ")]
    assert prompts[0] == prompts[1]  # the system message stayed, the first exchange did not


def test_bytes_that_are_no_text_are_asked_and_answered(up: Up) -> None:
    code, out, err = chat(up.url, b"\xff\xfe \xed\xa0\x80 \x00 \x1b[31m", "Grüße, 世界 🙂".encode())
    assert (code, err) == (0, "")
    assert len([line for line in out.splitlines() if line.startswith("cached ")]) == 2
    assert "\x1b" not in out


def test_a_refused_turn_is_told_and_the_chat_goes_on(up: Up) -> None:
    code, out, _ = chat(up.url, b"long " * 2000, b"short")
    assert code == 0
    assert "context" in out
    assert len([line for line in out.splitlines() if line.startswith("cached ")]) == 1


def test_a_model_that_is_not_there(up: Up) -> None:
    code, _, err = chat(up.url, b"Hello.", more=("--model", "other"))
    assert (code, err) == (2, "error --model: the server has embedded, not other\n")


def test_no_server() -> None:
    code, out, err = chat("http://127.0.0.1:1", b"Hello.")
    assert (code, out) == (2, "")
    assert err == "error no server answers at http://127.0.0.1:1; start one with `cachedattention up`\n"


@pytest.mark.parametrize("url", ["ftp://x", "nonsense", "http://[::1", ""])
def test_no_url(url: str) -> None:
    code, _, err = chat(url, b"Hello.")
    assert code == 2
    assert err.startswith("error ")


class Misbehaving(BaseHTTPRequestHandler):
    """Streams whatever the class says, then closes."""

    stream = b""

    def do_GET(self) -> None:
        self._send(b'{"data": [{"id": "m"}]}')

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._send(self.stream)

    def _send(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) + (self.command == "POST")))  # one byte never comes
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.mark.parametrize(
    "stream",
    [
        b"",
        b"data: {",
        b"data: 5\n\n",
        b'data: {"choices": [{"delta": {"content": "half an ans',
        b'data: {"choices": [{"delta": {"content": "no usage"}}]}\n\ndata: [DONE]\n\n',
        b'data: {"error": {"message": "it broke"}}\n\n',
        b"\xff\xfe\x00\n\ndata: \xff\n\n",
    ],
)
def test_a_server_that_breaks_off_is_told_and_the_chat_goes_on(stream: bytes) -> None:
    handler = type("Handler", (Misbehaving,), {"stream": stream})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        code, out, err = chat(f"http://127.0.0.1:{server.server_address[1]}", b"Hello.", b"Again.")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert (code, err) == (0, "")
    assert "cached" not in out


def test_the_line_below_an_answer() -> None:
    usage = {
        "prompt_tokens": 1300,
        "prompt_tokens_details": {"cached_tokens": 1234},
        "cachedattention": {"hbm": 0, "dram": 1234, "ssd": 0, "computed": 60, "missed": {"evicted": 6}},
    }
    assert summary(usage, 0.0412) == (
        "cached 1,234 of 1,300 tokens (hbm 0 · dram 1,234 · ssd 0 · computed 60 · missed 6) · TTFT 41 ms"
    )


def test_an_answer_cannot_command_the_terminal() -> None:
    assert printable("a\x1b[2Jb\x07\n\t\x9b") == "a\ufffd[2Jb\ufffd\n\t\ufffd"


def test_a_conversation_is_resent_whole() -> None:
    conversation = Conversation("Be brief.")
    conversation.record("a", "b")
    assert [message["content"] for message in conversation.with_user("c")] == ["Be brief.", "a", "b", "c"]
    assert len(conversation.messages) == 2


def test_events_split_at_newlines_only() -> None:
    """JSON may carry U+2028 and U+0085 as they are; they end no line of a stream."""
    text = "a\u2028b\u0085c"
    body = f"data: {json.dumps(text, ensure_ascii=False)}\n\n".replace(
        json.dumps(text, ensure_ascii=False), json.dumps({"t": text}, ensure_ascii=False)
    )
    response = httpx.Response(200, content=body.encode() + b": comment\n\ndata: [DONE]\n\ndata: {}\n\n")
    assert list(events(response)) == [{"t": text}]
    with pytest.raises(PeerError, match="no JSON object"):
        list(events(httpx.Response(200, content=b"data: []\n\n")))
