"""The keys of a provider, read from a real one on this machine: when, how often, and what happens when it fails."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
import threading
import time
import warnings
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from joserfc import jwk, jws

from gatekeeper.commands import anobody, arun, nobody, run
from gatekeeper.jwks import GREATEST, PAUSE, PAUSE_EMPTY, Jwks, fetch
from gatekeeper.sessions.foreign import ForeignTokens

NOW = 1_800_000_000


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def segment(raw: bytes) -> str:
    return urlsafe_b64encode(raw).rstrip(b"=").decode()


class Issuer:
    """A provider that has keys, publishes those it says, and signs with any."""

    def __init__(self) -> None:
        self.pairs: dict[str, jwk.ECKey] = {}
        self.published: list[str] = []
        self.requests = 0
        self.paths: list[str] = []
        self.answer: Callable[[BaseHTTPRequestHandler], None] | None = None
        self.url = ""

    def publish(self, *kids: str) -> None:
        self.published = list(kids)

    def key(self, kid: str) -> jwk.ECKey:
        if kid not in self.pairs:
            self.pairs[kid] = jwk.ECKey.generate_key("P-256")
        return self.pairs[kid]

    def token(self, kid: str, **members: Any) -> str:
        head = {"alg": "ES256", "kid": kid}
        claims = {"iss": self.url, "aud": "api", "iat": NOW, "exp": NOW + 600, "sub": "ada", **members}
        content = f"{segment(json.dumps(head).encode())}.{segment(json.dumps(claims).encode())}"
        signature = jws.JWSRegistry.algorithms["ES256"].sign(content.encode(), self.key(kid))
        return f"{content}.{segment(signature)}"

    def respond(self, handler: BaseHTTPRequestHandler) -> None:
        self.requests += 1
        self.paths.append(handler.path)
        if self.answer is not None:
            self.answer(handler)
            return
        keys = [{**self.key(kid).as_dict(private=False), "kid": kid, "use": "sig"} for kid in self.published]
        send(handler, 200, json.dumps({"keys": keys}).encode())


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes, **fields: str) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **fields}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


@contextmanager
def serving(issuer: Issuer, context: ssl.SSLContext | None = None, port: int = 0) -> Iterator[ThreadingHTTPServer]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                issuer.respond(self)
            except OSError:  # who asked has left
                self.close_connection = True

        def log_message(self, *arguments: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *arguments: object) -> None:
            pass

    server = Server(("127.0.0.1", port), Handler)
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    issuer.url = f"http{'s' if context else ''}://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    issuer = Issuer()
    issuer.publish("first")
    with serving(issuer):
        yield issuer


@pytest.fixture
def clock() -> Clock:
    return Clock()


Ask = Callable[[str], Any]


class Reader:
    """What reads the tokens of an issuer, blocking."""

    def __init__(self, issuer: Issuer, clock: Clock, **settings: Any) -> None:
        self.said: list[str] = []
        self.source = Jwks(
            f"{issuer.url}/keys?v=1", warn=self.said.append, clock=clock, **{"timeout": 5.0, **settings}
        )
        self.tokens = ForeignTokens(self.source, issuer=issuer.url, audience="api")

    def __call__(self, token: str) -> Any:
        return run(self.tokens.claims(token, NOW, blocking=True), nobody)

    def settle(self) -> None:
        """Wait for what is being read, if anything is."""
        reading = self.source._reading
        if reading is not None:
            reading.result(10)


@pytest.fixture
def read(issuer: Issuer, clock: Clock) -> Reader:
    return Reader(issuer, clock)


class TestReading:
    def test_nothing_is_read_before_a_token_comes_and_then_once(self, issuer: Issuer, read: Reader) -> None:
        assert issuer.requests == 0
        for _ in range(5):
            assert read(issuer.token("first"))["sub"] == "ada"
        assert issuer.requests == 1
        assert issuer.paths == ["/keys?v=1"]

    def test_a_key_that_is_new_is_read_and_one_that_is_gone_is_forgotten(
        self, issuer: Issuer, read: Reader, clock: Clock
    ) -> None:
        old = issuer.token("first")
        assert read(old) is not None
        issuer.publish("first", "second")
        clock.now += PAUSE
        assert read(issuer.token("second"))["sub"] == "ada"
        assert read(old) is not None, "both are good while both are published"
        issuer.publish("second", "third")
        clock.now += PAUSE
        assert read(issuer.token("third")) is not None
        assert read(old) is None
        assert issuer.requests == 3

    def test_a_flood_of_unknown_keys_asks_the_issuer_once_a_minute(
        self, issuer: Issuer, read: Reader, clock: Clock
    ) -> None:
        assert read(issuer.token("first")) is not None
        token = issuer.token("nobody's")
        _, claims, signature = token.split(".")
        forged = [
            f"{segment(json.dumps({'alg': 'ES256', 'kid': f'kid{number}'}).encode())}.{claims}.{signature}"
            for number in range(300)
        ]
        for minute in range(3):
            for one in forged:
                assert read(one) is None
            assert issuer.requests == 1 + minute
            clock.now += PAUSE - 1
            assert read(forged[0]) is None
            assert issuer.requests == 1 + minute
            clock.now += 1
        assert read.tokens.counts["key"] == 3 * len(forged) + 3
        assert read(issuer.token("first")) is not None, "and who has a token is not disturbed"

    def test_many_who_need_the_keys_at_once_wait_for_one_reading(self, issuer: Issuer, read: Reader) -> None:
        gate, token = threading.Event(), issuer.token("first")
        plain = issuer.respond

        def slow(handler: BaseHTTPRequestHandler) -> None:
            gate.wait(10)
            issuer.answer = None
            issuer.requests -= 1
            plain(handler)

        issuer.answer = slow
        found: list[Any] = []
        threads = [threading.Thread(target=lambda: found.append(read(token))) for _ in range(16)]
        for thread in threads:
            thread.start()
        gate.set()
        for thread in threads:
            thread.join(10)
        assert [one["sub"] for one in found] == ["ada"] * 16
        assert issuer.requests == 1

    def test_one_reading_goes_on_at_a_time_however_long_it_takes(
        self, issuer: Issuer, read: Reader, clock: Clock
    ) -> None:
        gate = threading.Event()
        issuer.answer = lambda handler: send(handler, 503, b"") if gate.wait(10) else None
        reading = read.source.begin()
        assert reading is not None
        for _ in range(5):
            clock.now += PAUSE
            assert read.source.begin() is reading
        gate.set()
        read.settle()
        assert issuer.requests == 1

    def test_keys_are_read_again_after_a_while_and_nobody_waits_for_it(
        self, issuer: Issuer, read: Reader, clock: Clock
    ) -> None:
        token = issuer.token("first")
        assert read(token) is not None
        issuer.publish("second")
        clock.now += 3599
        assert read(token) is not None
        read.settle()
        assert issuer.requests == 1
        # The issuer answers once it may: else it could be faster than the reader.
        may, paths = threading.Event(), issuer.paths

        def answer(handler: BaseHTTPRequestHandler) -> None:
            may.wait(10)
            issuer.answer, issuer.requests = None, issuer.requests - 1
            paths.pop()
            issuer.respond(handler)

        issuer.answer = answer
        clock.now += 1
        assert read(token) is not None, "by the keys that are there"
        may.set()
        read.settle()
        assert issuer.requests == 2
        assert read(token) is None, "what the issuer took back is good no more, though no new key was asked for"


class TestStrangers:
    def test_another_issuer_s_token_is_none_whatever_it_says(self, issuer: Issuer, read: Reader) -> None:
        assert read(issuer.token("first")) is not None
        other = Issuer()
        with serving(other):
            assert read(other.token("first")) is None
            assert read(other.token("first", iss=issuer.url)) is None
            assert other.requests == 0
        assert read(issuer.token("first", iss=other.url)) is None
        assert read.tokens.counts == {"signature": 2, "foreign": 1}

    def test_a_token_that_was_issued_for_another_service_is_none(self, issuer: Issuer, read: Reader) -> None:
        for audience in ("mobile", ["mobile", "web"], None):
            assert read(issuer.token("first", aud=audience)) is None
        assert read.tokens.counts == {"foreign": 3}


class TestFailure:
    def test_while_the_issuer_is_down_the_keys_hold_on_and_it_is_told_once(self, clock: Clock) -> None:
        issuer = Issuer()
        issuer.publish("first")
        with serving(issuer) as server:
            read = Reader(issuer, clock)
            token = issuer.token("first")
            assert read(token) is not None
        port = server.server_address[1]
        for _ in range(5):
            clock.now += 7200
            assert read(token) is not None
            read.settle()
            assert read(issuer.token("second")) is None
        assert len(read.said) == 1
        assert "as they were" in read.said[0]
        assert "v=1" not in read.said[0], "a query may hold a secret"
        issuer.publish("second")
        with serving(issuer, port=port):
            clock.now += PAUSE
            assert read(issuer.token("second")) is not None
        assert read.said[1:] == ["127.0.0.1: the keys of the issuer are read again"]

    def test_an_issuer_that_is_down_at_first_is_asked_again_soon(self, issuer: Issuer, clock: Clock) -> None:
        issuer.answer = lambda handler: send(handler, 503, b"later")
        read = Reader(issuer, clock)
        for _ in range(20):
            assert read(issuer.token("first")) is None
        assert issuer.requests == 1
        issuer.answer = None
        clock.now += PAUSE_EMPTY
        assert read(issuer.token("first")) is not None

    @pytest.mark.parametrize(
        ("status", "body", "told"),
        [
            (404, b"", "404"),
            (204, b"", "204"),
            (500, b'{"keys": []}', "500"),
            (200, b"<html>", "JWK Set"),
            (200, b'{"keys": {}}', "JWK Set"),
            (200, b" " * (GREATEST + 1), f"at most {GREATEST} bytes"),
        ],
    )
    def test_what_is_no_set_of_keys_leaves_those_there_were(
        self, issuer: Issuer, read: Reader, clock: Clock, status: int, body: bytes, told: str
    ) -> None:
        token = issuer.token("first")
        assert read(token) is not None
        issuer.answer = lambda handler: send(handler, status, body)
        clock.now += PAUSE
        assert read(issuer.token("second")) is None
        assert read(token) is not None
        assert told in read.said[0]

    @pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
    def test_no_redirect_is_followed(self, issuer: Issuer, read: Reader, status: int) -> None:
        other = Issuer()
        other.publish("first")
        with serving(other):
            issuer.answer = lambda handler: send(handler, status, b"", Location=f"{other.url}/keys")
            assert read(issuer.token("first")) is None
            assert other.requests == 0
        assert str(status) in read.said[0]

    @pytest.mark.parametrize("where", ["nothing", "head", "body"])
    def test_who_answers_too_slowly_is_not_waited_for(self, issuer: Issuer, clock: Clock, where: str) -> None:
        ended = threading.Event()

        def drip(handler: BaseHTTPRequestHandler) -> None:
            try:
                if where == "body":
                    send(handler, 200, b"{", **{"Content-Length": "1000000"})
                elif where == "head":
                    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
                while not ended.wait(0.02):
                    handler.wfile.write(b" " if where != "nothing" else b"")
            finally:
                ended.set()

        issuer.answer = drip
        read = Reader(issuer, clock, timeout=0.3)
        begun = time.monotonic()
        assert read(issuer.token("first")) is None
        read.settle()
        assert time.monotonic() - begun < 5
        assert not read.source.keys
        ended.set()
        assert read.said

    def test_where_nobody_listens_it_is_an_error_like_others(self, clock: Clock) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        with pytest.raises(OSError, match="refused"):
            fetch(f"http://127.0.0.1:{port}/keys", 1)


class TestAwaiting:
    def test_the_loop_goes_on_while_the_keys_are_read(self, issuer: Issuer, read: Reader) -> None:
        token, gate = issuer.token("first"), threading.Event()
        plain = issuer.respond

        def slow(handler: BaseHTTPRequestHandler) -> None:
            gate.wait(10)
            issuer.answer = None
            plain(handler)

        issuer.answer = slow

        async def main() -> Any:
            asked = [
                asyncio.ensure_future(arun(read.tokens.claims(token, NOW, blocking=False), anobody))
                for _ in range(8)
            ]
            for _ in range(50):
                await asyncio.sleep(0)
            assert not any(one.done() for one in asked)
            asked[0].cancel()  # who leaves takes nothing from those who wait for the same
            await asyncio.sleep(0)
            gate.set()
            return await asyncio.gather(*asked[1:])

        assert [one["sub"] for one in asyncio.run(main())] == ["ada"] * 7

    def test_it_does_not_wait_longer_than_it_may(self, issuer: Issuer, clock: Clock) -> None:
        gate = threading.Event()
        issuer.answer = lambda handler: send(handler, 200, b"") if gate.wait(10) else None
        read = Reader(issuer, clock, timeout=0.2)
        found = asyncio.run(arun(read.tokens.claims(issuer.token("first"), NOW, blocking=False), anobody))
        gate.set()
        read.settle()
        assert found is None


def test_a_process_that_is_forked_while_keys_are_read_reads_them_itself(issuer: Issuer, read: Reader) -> None:
    gate, began = threading.Event(), threading.Event()
    plain, token = issuer.respond, issuer.token("first")

    def slow(handler: BaseHTTPRequestHandler) -> None:
        issuer.answer = None
        began.set()
        gate.wait(10)
        plain(handler)

    issuer.answer = slow
    read.source.begin()
    assert began.wait(10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork with threads, as servers do it
        child = os.fork()
    if child == 0:
        read.source._begun = float("-inf")
        os._exit(0 if read(token) is not None else 1)
    _, status = os.waitpid(child, 0)
    gate.set()
    read.settle()
    assert os.waitstatus_to_exitcode(status) == 0


class TestTls:
    @pytest.fixture
    def certificate(self, tmp_path: Path) -> Path:
        """A certificate for this machine, and its key, that only who is told trusts."""
        key, name = (
            ec.generate_private_key(ec.SECP256R1()),
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "id")]),
        )
        now = datetime.now(UTC)
        made = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(hours=1))
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        path = tmp_path / "certificate.pem"
        path.write_bytes(
            made.public_bytes(serialization.Encoding.PEM)
            + key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return path

    def test_a_certificate_that_nobody_vouches_for_is_refused(
        self, certificate: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        issuer = Issuer()
        issuer.publish("first")
        with serving(issuer, context):
            read = Reader(issuer, clock)
            assert read(issuer.token("first")) is None
            assert issuer.requests == 0
            assert "CERTIFICATE_VERIFY_FAILED" in read.said[0]
            monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
            clock.now += PAUSE_EMPTY
            assert read(issuer.token("first")) is not None
