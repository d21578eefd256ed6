"""Who may ask: API keys from a file and a line, admins, tenants; loopback, TLS and pages of other origins."""

from __future__ import annotations

import shutil
import ssl
import stat
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from structlog.testing import capture_logs

from cli.keys import add_api_key
from gateway.api_keys import ApiKey, ApiKeys, digest_of, load_api_keys, new_key
from gateway.config import is_loopback
from gateway.limits import Limits
from gateway.service import check_tls
from gateway.tenants import Forbidden, Tenants, Unauthorized
from protocol.errors import ConfigError
from tests.gateway.inference_peer import MODEL
from tests.gateway.serving import ServedGateway, eventually, make_config, talk

KEYS = ApiKeys(
    (
        ApiKey(name="ann", sha256=digest_of("ann-key"), tenant="research"),
        ApiKey(name="ann's phone", sha256=digest_of("ann-phone"), tenant="research"),
        ApiKey(name="bob", sha256=digest_of("bob-key")),
        ApiKey(name="root", sha256=digest_of("root-key"), admin=True),
    )
)


# -- keys ----------------------------------------------------------------------------------------------------------


def test_keys_of_one_tenant_are_one_and_nobody_else_is_let_in() -> None:
    tenants = Tenants(b"1" * 32, KEYS)
    ann, phone, bob, root = (
        tenants.identify(f"Bearer {key}") for key in ("ann-key", "ann-phone", "bob-key", "root-key")
    )
    assert ann == phone
    assert ann.name == "research"
    assert bob.salt == root.salt != ann.salt
    assert (bob.is_admin, root.is_admin) == (False, True)
    for header in (
        None,
        "",
        "Bearer ",
        "Bearer ann",
        "Bearer ann-key2",
        f"Bearer {digest_of('ann-key')}",
        "Basic ann-key",
    ):
        with pytest.raises(Unauthorized):
            tenants.identify(header)
    assert tenants.require_admin("Bearer root-key") == root
    with pytest.raises(Forbidden, match="not one"):
        tenants.require_admin("Bearer bob-key")
    with pytest.raises(Forbidden, match="none is configured"):
        Tenants(b"1" * 32).require_admin("Bearer root-key")
    assert Tenants(b"2" * 32, KEYS).identify("Bearer ann-key").salt != ann.salt


def test_a_named_tenant_is_no_anonymous_token() -> None:
    """A token that reads like a tenant's name sees nothing of the tenant's."""
    named = Tenants(b"1" * 32, KEYS).identify("Bearer ann-key")
    assert Tenants(b"1" * 32).identify("Bearer research").salt != named.salt


def test_keys_in_a_file_and_a_line(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    ann = add_api_key(path, 'ann\'s "laptop"', "research", admin=False)
    root = add_api_key(path, "root", "default", admin=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert ann not in path.read_text()
    path.write_text(path.read_text() + "[tenants.research]\nrequests_per_minute = 5\n[limits]\npriority = 1\n")
    more = new_key()
    keys = load_api_keys(path, f" ci={digest_of(more)} , ops={digest_of('x')}=admin,")
    found = {token: keys.find(token) for token in (ann, root, more, "x", "no")}
    assert found.pop("no") is None
    assert {key.name: (key.tenant, key.admin) for key in found.values() if key} == {
        'ann\'s "laptop"': ("research", False),
        "root": ("default", True),
        "ci": ("default", False),
        "ops": ("default", True),
    }
    assert keys.limits_of("research") == Limits(requests_per_minute=5)
    assert keys.limits_of("default") == Limits(priority=1)
    with pytest.raises(ConfigError, match="one name"):
        add_api_key(path, "root", "default", admin=False)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("keys = 1", "keys"),
        ("[[keys]]\nname = 'a'", "sha256"),
        ("[[keys]]\nname = 'a'\nsha256 = 'secret-key-by-mistake'", "sha256"),
        (f"[[keys]]\nname = 'a'\nsha256 = '{'0' * 64}'\nadmins = true", "admins"),
        (f"[[keys]]\nname = 'a'\nsha256 = '{'0' * 64}'\n[[keys]]\nname = 'b'\nsha256 = '{'0' * 64}'", "one sha256"),
        ("[tenants.x]\nrequests_per_minute = 5", "no key is for tenant 'x'"),
        ("[limits]\nrequests_per_minute = 0", "requests_per_minute"),
        ("[limits]\nrequests_per_hour = 1", "requests_per_hour"),
        ("[limits]\npriority = 'high'", "limits.priority"),
        ("[[keys", "not TOML"),
    ],
)
def test_a_bad_file_stops_the_start_and_shows_no_value(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as stopped:
        load_api_keys(path)
    assert told in stopped.value.message
    assert str(path) in stopped.value.message
    assert "secret" not in stopped.value.message


def test_a_bad_line_stops_the_start(tmp_path: Path) -> None:
    for line in ("ann", "ann=abc", f"ann={'0' * 64}=root", f"ann={'0' * 64},bob"):
        with pytest.raises(ConfigError, match="api_key_hashes: entry"):
            load_api_keys(None, line)
    with pytest.raises(ConfigError, match="cannot read"):
        load_api_keys(tmp_path / "missing.toml")


# -- addresses -------------------------------------------------------------------------------------------------------


def test_without_keys_only_loopback_is_served(tmp_path: Path) -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost")] == [True] * 4
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org", "127.0.0.1.example.org", "")))
    with pytest.raises(ConfigError, match="--api-keys") as stopped:
        make_config(tmp_path, host="0.0.0.0")
    assert stopped.value.param == "host"
    make_config(tmp_path, host="0.0.0.0", api_keys=KEYS)
    make_config(tmp_path, host="0.0.0.0", anonymous=True)


# -- over HTTP -------------------------------------------------------------------------------------------------------


@pytest.fixture
def keyed(directory: Path) -> Iterator[ServedGateway]:
    gateway = ServedGateway(directory, api_keys=KEYS, max_running=1, cors_origins=("https://chat.example",))
    yield gateway
    gateway.set_hold(False)
    gateway.close()


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_every_api_route_needs_a_key(keyed: ServedGateway) -> None:
    """And says nothing else without one; what probes ask stays open."""
    asked: list[tuple[str, str, Any]] = [
        ("POST", "/v1/chat/completions", {"model": MODEL, "messages": talk("hi")}),
        ("POST", "/v1/completions", {"model": MODEL, "prompt": "hi"}),
        ("POST", "/tokenize", {"prompt": "hi"}),
        ("POST", "/detokenize", {"tokens": [1]}),
        ("GET", "/v1/models", None),
        ("GET", f"/v1/models/{MODEL}", None),
        ("GET", "/admin/tenants", None),
        ("GET", "/admin/queue", None),
        ("POST", "/admin/drain", None),
        ("POST", "/admin/resume", None),
    ]
    for method, path, body in asked:
        for headers in ({}, _bearer("wrong")):
            reply = httpx.request(method, keyed.url + path, json=body, headers=headers)
            assert reply.status_code == 401, path
            assert reply.json()["error"]["type"] == "authentication_error"
        granted = 403 if path.startswith("/admin") else 200
        assert httpx.request(method, keyed.url + path, json=body, headers=_bearer("ann-key")).status_code == granted
    for path in ("/health", "/ready", "/metrics"):
        assert keyed.get(path).status_code == 200
    with keyed.openai() as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    assert "ann-key" not in keyed.get("/metrics").text


def test_a_key_that_is_taken_out_opens_nothing(directory: Path) -> None:
    """Without a restart. A file that cannot be read changes nothing; one without keys opens the gateway to nobody."""
    path = directory / "keys.toml"
    entries = {name: f'[[keys]]\nname = "{name}"\nsha256 = "{digest_of(name)}"\n' for name in ("ann", "bob")}
    path.write_text("".join(entries.values()))
    gateway = ServedGateway(directory, api_keys=load_api_keys(path), api_key_file=path)
    try:

        def status(key: str) -> int:
            return httpx.get(f"{gateway.url}/v1/models", headers=_bearer(key), timeout=30.0).status_code

        assert [status(name) for name in entries] == [200, 200]
        with capture_logs() as logs:
            path.write_text("[[keys]]\nname = ")
            eventually(lambda: any(entry["log_level"] == "error" for entry in logs))
        assert [status(name) for name in entries] == [200, 200]
        path.write_text(entries["bob"] + "[tenants.default]\nrequests_per_minute = 1\n")
        eventually(lambda: status("ann") == 401)
        assert status("bob") == 200
        gateway.chat("one", token="bob")
        asked = gateway.post({"model": MODEL, "messages": talk("two")}, headers=_bearer("bob"))
        assert asked.status_code == 429
        path.write_text("")
        eventually(lambda: status("bob") == 401)
        assert gateway.get("/v1/models").status_code == 401
    finally:
        gateway.close()


def test_an_admin_sees_what_tenants_use_and_who_waits(keyed: ServedGateway) -> None:
    answer = keyed.chat("one", token="ann-key")["choices"][0]["message"]["content"]
    keyed.chat("one", answer, "two", token="ann-phone")
    keyed.chat("x", token="bob-key")
    listed = httpx.get(f"{keyed.url}/admin/tenants", headers=_bearer("root-key")).json()["data"]
    research, default = sorted(listed, key=lambda tenant: tenant["tenant"], reverse=True)
    assert (research["tenant"], research["requests"], default["tenant"], default["requests"]) == (
        "research",
        2,
        "default",
        1,
    )
    assert 0 < research["cached_tokens"] < research["prompt_tokens"]
    keyed.set_hold(True)
    with ThreadPoolExecutor(2) as pool:
        replies = [pool.submit(keyed.chat, "x", token="ann-key") for _ in range(2)]
        eventually(lambda: keyed.metric("queue_depth") == 1)
        view = httpx.get(f"{keyed.url}/admin/queue", headers=_bearer("root-key")).json()
        assert (len(view["running"]), len(view["waiting"]), view["drained"]) == (1, 1, False)
        assert view["waiting"][0]["tenant"] == "research"
        keyed.set_hold(False)
        for reply in replies:
            reply.result(30.0)


def test_a_drained_gateway_ends_what_it_has_and_takes_nothing_new(keyed: ServedGateway) -> None:
    keyed.set_hold(True)
    with ThreadPoolExecutor(2) as pool:
        replies = [pool.submit(keyed.chat, "x", token="ann-key") for _ in range(2)]
        eventually(lambda: keyed.metric("queue_depth") == 1)
        assert httpx.post(f"{keyed.url}/admin/drain", headers=_bearer("root-key")).json()["drained"] is True
        assert keyed.get("/ready").status_code == 503
        refused = keyed.post({"model": MODEL, "messages": talk("x")}, headers=_bearer("ann-key"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        keyed.set_hold(False)
        for reply in replies:
            reply.result(30.0)
    httpx.post(f"{keyed.url}/admin/resume", headers=_bearer("root-key")).raise_for_status()
    assert keyed.get("/ready").status_code == 200
    keyed.chat("x", token="ann-key")


def test_pages_of_listed_origins_may_ask(keyed: ServedGateway) -> None:
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    for origin, allowed in (("https://chat.example", True), ("https://evil.example", False)):
        asked = httpx.options(f"{keyed.url}/v1/chat/completions", headers={"Origin": origin, **preflight})
        assert asked.is_success == allowed
        reply = httpx.get(f"{keyed.url}/v1/models", headers={"Origin": origin, **_bearer("ann-key")})
        assert ("access-control-allow-origin" in reply.headers) == allowed
        assert "access-control-allow-credentials" not in reply.headers


# -- TLS -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("needs the program openssl to make a certificate")
    directory = tmp_path_factory.mktemp("tls")
    paths = directory / "certificate.pem", directory / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-out", str(paths[0]), "-keyout", str(paths[1])]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return paths


def test_tls(directory: Path, certificate: tuple[Path, Path]) -> None:
    """Over the certificate's own name, a whole streamed turn; plain HTTP gets nothing."""
    gateway = ServedGateway(directory, peer=False, tls_certificate=certificate[0], tls_key=certificate[1])
    try:
        gateway.call(gateway.peer.server.start())
        context = ssl.create_default_context(cafile=str(certificate[0]))
        with httpx.Client(base_url=f"https://localhost:{gateway.port}", verify=context, timeout=30.0) as client:
            eventually(lambda: client.get("/ready").status_code == 200)
            body = {"model": MODEL, "messages": talk("hi"), "stream": True}
            assert "[DONE]" in client.post("/v1/chat/completions", json=body).text
        with pytest.raises(httpx.TransportError):
            gateway.get("/health")
    finally:
        gateway.close()


def test_tls_that_cannot_work_stops_the_start(directory: Path, certificate: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="tls_key is missing"):
        make_config(directory, tls_certificate=certificate[0])
    for pair in ((certificate[1], certificate[1]), (directory / "none.pem", certificate[1])):
        with pytest.raises(ConfigError, match="TLS with"):
            check_tls(make_config(directory, tls_certificate=pair[0], tls_key=pair[1]))
