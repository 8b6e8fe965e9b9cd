"""Tokens of our own: what is accepted, and the many ways in which what looks like one is none."""

from __future__ import annotations

import hmac
import json
import os
import socket
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from joserfc import jwe, jwk, jws

from gatekeeper.commands import nobody, run
from gatekeeper.http.message import ScopeRequest
from gatekeeper.keyfiles import generate
from gatekeeper.keys import ALGORITHMS, HMAC_BYTES, Key, KeyRingError, KeyState, Ring
from gatekeeper.sessions.cookies import Cookie
from gatekeeper.sessions.flow import TokenSessions
from gatekeeper.sessions.tokens import (
    LEEWAY,
    LONGEST,
    REASONS,
    REMEMBERED,
    REMEMBERED_CHARACTERS,
    TokenError,
    Tokens,
    asymmetric,
)

NOW, LIFE = 1_800_000_000, 3600
SIGNING = [algorithm for algorithm in ALGORITHMS if algorithm != "A256GCM"]
CLAIMS: dict[str, Any] = {"sub": "ada", "data": {"cart": ["apple", 1.5, None, "Zoë"]}, "exp": NOW + LIFE}


@cache
def key(algorithm: str = "HS256", id: str = "") -> Key:
    """A key, the same for the same words: those of RSA take a while to make."""
    found = generate(algorithm, KeyState.ACTIVE, NOW)
    return Key(id or algorithm, algorithm, found.secret, KeyState.ACTIVE, NOW)


def in_state(found: Key, state: KeyState) -> Key:
    return Key(found.id, found.algorithm, found.secret, state, found.created)


def public(found: Key) -> bytes:
    """The PEM of the public key."""
    return bytes(asymmetric(found).as_pem(private=False))


def tokens(*keys: Key, **settings: Any) -> Tokens:
    return Tokens(Ring(keys or [key()]), **{"issuer": "us", "audience": "session", "longest": LIFE, **settings})


def segment(raw: bytes) -> str:
    return urlsafe_b64encode(raw).rstrip(b"=").decode()


def raw(token_segment: str) -> bytes:
    return urlsafe_b64decode(token_segment + "=" * (-len(token_segment) % 4))


def as_bytes(document: object) -> bytes:
    return document if isinstance(document, bytes) else json.dumps(document).encode()


def header(found: Key | None = None, **members: Any) -> dict[str, Any]:
    found = found or key()
    return {"alg": found.algorithm, "kid": found.id, "typ": "gks+jwt", **members}


def payload(**members: Any) -> dict[str, Any]:
    return {"iss": "us", "aud": "session", "iat": NOW, **CLAIMS, **members}


def signed(header: object, payload: object, found: Key | None = None, purpose: str = "session") -> str:
    """A token with a signature that is right, whatever it says: what only who has the key can make."""
    found = found or key()
    content = f"{segment(as_bytes(header))}.{segment(as_bytes(payload))}"
    if found.is_symmetric:
        secret = found.derive(purpose, HMAC_BYTES[found.algorithm])
        signature = hmac.digest(secret, content.encode(), f"sha{found.algorithm[2:]}")
    else:
        signature = jws.JWSRegistry.algorithms[found.algorithm].sign(content.encode(), asymmetric(found))
    return f"{content}.{segment(signature)}"


def reason(opener: Tokens, token: str, now: int = NOW) -> str:
    """Why a token is none; an empty text if it is one."""
    try:
        opener.open(token, now)
    except TokenError as error:
        return error.reason
    return ""


def without(document: Mapping[str, Any], member: str) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name != member}


class TestEachAlgorithm:
    @pytest.mark.parametrize("algorithm", SIGNING)
    def test_what_is_sealed_is_opened_and_says_the_same(self, algorithm: str) -> None:
        one = tokens(key(algorithm))
        token = one.seal(CLAIMS, NOW)
        claims = tokens(key(algorithm)).open(token, NOW)
        assert dict(claims) == payload()
        assert claims.key.id == algorithm
        assert json.loads(raw(token.split(".")[0])) == header(key(algorithm))

    @pytest.mark.parametrize("algorithm", SIGNING)
    def test_a_signature_by_another_hand_is_read(self, algorithm: str) -> None:
        assert reason(tokens(key(algorithm)), signed(header(key(algorithm)), payload(), key(algorithm))) == ""

    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_any_key_that_has_a_secret_encrypts(self, algorithm: str) -> None:
        one = tokens(key(algorithm), encrypt=True)
        token = one.seal(CLAIMS, NOW)
        assert dict(tokens(key(algorithm), encrypt=True).open(token, NOW)) == payload()
        assert json.loads(raw(token.split(".")[0])) == {
            "alg": "dir", "enc": "A256GCM", "kid": algorithm, "typ": "gks+jwt",
        }  # fmt: skip
        assert b"ada" not in b"".join(map(raw, token.split(".")))

    @pytest.mark.parametrize("algorithm", ["RS256", "PS256", "ES256", "EdDSA"])
    def test_a_public_key_verifies_and_does_not_sign(self, algorithm: str) -> None:
        token = tokens(key(algorithm)).seal(CLAIMS, NOW)
        half = Key(algorithm, algorithm, public(key(algorithm)), KeyState.RETIRING)
        one = tokens(half, key())
        assert one.open(token, NOW)["sub"] == "ada"
        assert json.loads(raw(one.seal(CLAIMS, NOW).split(".")[0]))["kid"] == key().id
        with pytest.raises(KeyRingError, match="private key"):
            Ring([Key("a", algorithm, public(key(algorithm)))])

    @pytest.mark.parametrize("algorithm", SIGNING)
    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_one_character_changed_anywhere_makes_it_none(self, algorithm: str, place: int) -> None:
        one = tokens(key(algorithm))
        parts = one.seal(CLAIMS, NOW).split(".")
        for at in range(0, len(parts[place]), 1 + len(parts[place]) // 24):
            changed = list(parts)
            other = "A" if parts[place][at] != "A" else "B"
            changed[place] = parts[place][:at] + other + parts[place][at + 1 :]
            assert reason(one, ".".join(changed)) != ""


class TestForm:
    @pytest.mark.parametrize("encrypt", [False, True])
    def test_one_that_is_too_long_is_not_looked_at_though_its_signature_is_right(self, encrypt: bool) -> None:
        one = tokens(encrypt=encrypt)
        assert reason(tokens(), signed(header(), payload(data={"text": "x" * LONGEST}))) == "long"
        assert reason(one, "." * (LONGEST + 1)) == "long"
        with pytest.raises(ValueError, match=f"at most {LONGEST}"):
            one.seal({**CLAIMS, "data": {"text": "x" * LONGEST}}, NOW)

    @pytest.mark.parametrize(
        "change",
        [
            "", ".", "..", "...", "....", ".....", "a.b", "{0}.{1}", "{0}.{1}.{2}.", ".{0}.{1}.{2}", "{0}.{1}.",
            "{0}..{2}", ".{1}.{2}", "{0}.{1}.{2}=", "{0}=.{1}.{2}", " {0}.{1}.{2}", "{0}.{1}.{2}\n", "{0}.{1}.{2} ",
            "{0}.{1}.+{2}", "{0}.{1}/.{2}", "{0}.{1}.{2}é", "{0}.{1}.{2}\ud800", "{0}.{1}.{2}\0", "{0}.{1}.{2}.{2}.{2}",
            "{{}}.{1}.{2}", '{{"payload":"{1}","signatures":[]}}', "{2}.{1}.{0}", "{1}.{0}.{2}",
        ],
    )  # fmt: skip
    def test_what_has_another_form_is_none(self, change: str) -> None:
        one = tokens()
        parts = one.seal(CLAIMS, NOW).split(".")
        assert reason(one, change.format(*parts)) != ""

    def test_a_token_has_one_text_alone(self) -> None:
        one = tokens()
        token = one.seal(CLAIMS, NOW)
        alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
        alike = [last for last in alphabet if raw(token[-43:-1] + last) == raw(token[-43:])]
        assert len(alike) == 4, "the last character says two bits that nobody reads"
        assert [last for last in alike if reason(one, token[:-1] + last) == ""] == [token[-1]]


class TestHeader:
    @pytest.mark.parametrize(
        "member",
        [
            "crit", "b64", "zip", "jku", "jwk", "x5u", "x5c", "x5t", "x5t#S256", "cty", "enc", "epk", "iss", "exp", "",
            "ALG", "url", "nonce",
        ],
    )  # fmt: skip
    def test_a_member_that_we_do_not_write_makes_it_none(self, member: str) -> None:
        for value in (True, "DEF", ["exp"], {"kty": "oct", "k": segment(b"k" * 32)}, "https://127.0.0.1/", None):
            assert reason(tokens(), signed({**header(), member: value}, payload())) == "header"

    def test_no_address_in_a_header_is_turned_to(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.setblocking(False)
            url = f"http://127.0.0.1:{server.getsockname()[1]}/keys"
            for member in ("jku", "x5u", "kid", "iss"):
                assert reason(tokens(), signed({**header(), member: url}, payload())) in ("header", "key")
                with pytest.raises(BlockingIOError):
                    server.accept()

    @pytest.mark.parametrize("member", ["alg", "kid", "typ"])
    def test_a_member_that_is_missing_makes_it_none(self, member: str) -> None:
        assert reason(tokens(), signed(without(header(), member), payload())) == "header"

    @pytest.mark.parametrize(
        "algorithm",
        [
            "none", "None", "NONE", "nOnE", "none ", "", None, 0, 256, True, ["HS256"], {"HS256": 1}, "hs256", "HS384",
            "HS512", "RS256", "ES256", "HS256\0", "dir", "A256GCM",
        ],
    )  # fmt: skip
    def test_the_key_decides_on_the_algorithm_and_not_the_header(self, algorithm: object) -> None:
        token = signed(header(alg=algorithm), payload())
        assert reason(tokens(), token) == "key"
        assert reason(tokens(), token[: token.rindex(".") + 1]) == "key", "without a signature"

    @pytest.mark.parametrize("algorithm", ["RS256", "PS256", "ES256", "EdDSA"])
    @pytest.mark.parametrize("hashed", ["HS256", "HS384", "HS512"])
    def test_a_public_key_is_no_secret(self, algorithm: str, hashed: str) -> None:
        one = tokens(key(algorithm))
        pem = public(key(algorithm))
        for secret in (pem, pem.strip(), pem.replace(b"\n", b"\r\n"), public(key(algorithm)).split(b"\n")[1]):
            content = f"{segment(as_bytes(header(key(algorithm), alg=hashed)))}.{segment(as_bytes(payload()))}"
            forged = f"{content}.{segment(hmac.digest(secret, content.encode(), f'sha{hashed[2:]}'))}"
            assert reason(one, forged) == "key"

    @pytest.mark.parametrize("first", SIGNING)
    @pytest.mark.parametrize("second", SIGNING)
    def test_of_two_keys_in_a_ring_neither_stands_for_the_other(self, first: str, second: str) -> None:
        if first == second:
            return
        one = tokens(key(first), in_state(key(second), KeyState.RETIRING))
        assert reason(one, signed(header(key(first)), payload(), key(first))) == ""
        assert reason(one, signed(header(key(first)), payload(), key(second))) == "signature"
        assert reason(one, signed(header(key(first), kid=second), payload(), key(first))) == "key"
        assert reason(one, signed(header(key(second), kid=first), payload(), key(second))) == "key"

    @pytest.mark.parametrize(
        "id",
        [
            "", "other", "HS256 ", "hs256", "HS256\0", "../../../../dev/null", "/dev/null", "' OR '1'='1",
            "HS256' UNION SELECT 'x", "HS256|ls", "*", "%", 0, 1, -1, 1.0, True, False, None, [], ["HS256"], {},
            {"HS256": "HS256"}, "x" * 9000, "\u202e", "ＨＳ256",
        ],
    )  # fmt: skip
    def test_a_key_is_found_by_its_own_id_alone(self, id: object) -> None:
        assert reason(tokens(), signed(header(kid=id), payload())) == "key"

    @pytest.mark.parametrize("typ", ["JWT", "at+jwt", "gks+JWT", "application/gks+jwt", "gki+jwt", "", None, 1, []])
    def test_a_token_of_another_type_is_foreign(self, typ: object) -> None:
        assert reason(tokens(), signed(header(typ=typ), payload())) == "foreign"

    def test_a_header_that_was_never_signed_is_not_kept(self) -> None:
        one = tokens()
        for number in range(200):
            document = json.dumps(header()) + " " * number
            token = signed(document.encode(), payload())
            assert reason(one, token[:-8] + "AAAAAAAA") == "signature"
        assert not one._known.headers
        assert reason(one, one.seal(CLAIMS, NOW)) == ""
        assert len(one._known.headers) == 1


BROKEN = [
    b"", b"null", b"7", b'"text"', b"[]", b"[{}]", b"true", b"{", b"{}{}", b"{} x", b"\xff\xfe", b"\xef\xbb\xbf{}",
    b"{'a':1}", b'{"a":1,}', b"\0", b"[" * 9000, b'{"a":' * 2000 + b"1" + b"}" * 2000, '{"a":"\ud800"}'.encode(errors="surrogatepass"),
]  # fmt: skip


class TestDocuments:
    @pytest.mark.parametrize("document", BROKEN)
    def test_what_is_no_object_is_none_though_its_signature_is_right(self, document: bytes) -> None:
        assert reason(tokens(), signed(header(), document)) == "claims"
        assert reason(tokens(), signed(document, payload())) == "header"

    @pytest.mark.parametrize("name", ["iss", "aud", "iat", "exp", "sub"])
    def test_a_claim_that_stands_twice_makes_it_none(self, name: str) -> None:
        text = json.dumps(payload())
        for other in (json.dumps(payload()[name]), "0"):
            assert reason(tokens(), signed(header(), f'{text[:-1]},"{name}":{other}}}'.encode())) == "claims"
            spelt = name.replace("a", "\\u0061").replace("s", "\\u0073").replace("e", "\\u0065")
            assert reason(tokens(), signed(header(), f'{text[:-1]},"{spelt}":{other}}}'.encode())) == "claims"

    @pytest.mark.parametrize("name", ["alg", "kid", "typ"])
    def test_a_member_of_a_header_that_stands_twice_makes_it_none(self, name: str) -> None:
        text = json.dumps(header())
        for other in (json.dumps(header()[name]), '"none"'):
            assert reason(tokens(), signed(f'{text[:-1]},"{name}":{other}}}'.encode(), payload())) == "header"
            assert reason(tokens(), signed(f'{{"{name}":{other},{text[1:]}'.encode(), payload())) == "header"

    def test_a_member_deep_within_that_stands_twice_makes_it_none(self) -> None:
        text = json.dumps(payload(data=[{"a": 1}])).replace('{"a": 1}', '{"a": 1, "a": 1}')
        assert reason(tokens(), signed(header(), text.encode())) == "claims"

    @pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 5000])
    @pytest.mark.parametrize("name", ["exp", "iat", "data"])
    def test_what_is_no_number_makes_it_none(self, number: str, name: str) -> None:
        text = json.dumps(payload(**{name: "HERE"})).replace('"HERE"', number)
        assert reason(tokens(), signed(header(), text.encode())) == "claims"

    def test_what_json_cannot_hold_is_not_sealed(self) -> None:
        circle: list[Any] = []
        circle.append(circle)
        deep: list[Any] = []
        for _ in range(5000):
            deep = [deep]
        for value in (float("nan"), float("inf"), b"bytes", {1, 2}, object(), "\ud800", circle, deep, 10**5000):
            with pytest.raises(ValueError):  # noqa: PT011  # json's own, too
                tokens().seal({**CLAIMS, "data": value}, NOW)


class TestClaims:
    @pytest.mark.parametrize("name", ["exp", "iat"])
    @pytest.mark.parametrize(
        "value", [True, False, None, str(NOW + 5), "", NOW + 0.5, float(NOW + 5), [NOW + 5], {}]
    )
    def test_times_are_whole_numbers_and_nothing_like_them(self, name: str, value: object) -> None:
        assert reason(tokens(), signed(header(), payload(**{name: value}))) == "claims"
        with pytest.raises(ValueError, match="whole seconds"):
            tokens().seal({**CLAIMS, name: value}, NOW)

    @pytest.mark.parametrize("name", ["exp", "iat"])
    def test_both_times_have_to_be_there(self, name: str) -> None:
        assert reason(tokens(), signed(header(), without(payload(), name))) == "claims"
        with pytest.raises(ValueError, match="whole seconds"):
            tokens().seal(without(CLAIMS, "exp"), NOW)

    def test_it_is_good_to_the_second_before_it_expires(self) -> None:
        one = tokens()
        token = one.seal(CLAIMS, NOW)
        for opener in (one, tokens()):  # the second time it is looked up
            for _ in range(2):
                assert reason(opener, token, NOW + LIFE - 1) == ""
                assert reason(opener, token, NOW + LIFE) == "expired"
                assert reason(opener, token, NOW + LIFE + 1) == "expired"

    def test_who_issued_it_may_be_a_minute_ahead_and_not_more(self) -> None:
        assert LEEWAY <= 60
        one = tokens()
        token = one.seal(CLAIMS, NOW)
        for _ in range(2):
            assert reason(one, token, NOW - LEEWAY) == ""
            assert reason(one, token, NOW - LEEWAY - 1) == "early"

    def test_its_life_has_a_bound(self) -> None:
        assert reason(tokens(), signed(header(), payload(exp=NOW + LIFE))) == ""
        assert reason(tokens(), signed(header(), payload(exp=NOW + LIFE + 1))) == "claims"
        assert reason(tokens(), signed(header(), payload(exp=NOW - 1))) == "claims"
        assert reason(tokens(), signed(header(), payload(iat=-(10**18), exp=10**18))) == "claims"
        for expires in (NOW + LIFE + 1, NOW - 1):
            with pytest.raises(ValueError, match="at most 3600 s"):
                tokens().seal({**CLAIMS, "exp": expires}, NOW)

    @pytest.mark.parametrize("name", ["iss", "aud"])
    @pytest.mark.parametrize(
        "value", ["", "US", "us ", "session ", "sessions", ["us"], ["session"], ["session", "x"], None, True, {}]
    )
    def test_another_issuer_or_audience_is_foreign(self, name: str, value: object) -> None:
        assert reason(tokens(), signed(header(), payload(**{name: value}))) == "foreign"
        assert reason(tokens(), signed(header(), without(payload(), name))) == "foreign"

    def test_nobody_seals_as_another_issuer_or_for_another_audience(self) -> None:
        one = tokens()
        claims = one.open(one.seal({**CLAIMS, "iss": "them", "aud": "identity"}, NOW), NOW)
        assert (claims["iss"], claims["aud"]) == ("us", "session")

    @pytest.mark.parametrize("algorithm", ["HS256", "ES256"])
    def test_a_session_is_no_identity_and_an_identity_no_session(self, algorithm: str) -> None:
        ring = Ring([key(algorithm)])
        common: dict[str, Any] = {"issuer": "us", "longest": LIFE}
        session = Tokens(ring, audience="session", **common)
        identity = Tokens(ring, audience="identity", purpose="identity", typ="gki+jwt", **common)
        assert reason(identity, session.seal(CLAIMS, NOW)) == "foreign"
        assert reason(session, identity.seal(CLAIMS, NOW)) == "foreign"

    @pytest.mark.parametrize("encrypt", [False, True])
    def test_each_purpose_has_a_secret_of_its_own(self, encrypt: bool) -> None:
        one = tokens(encrypt=encrypt)
        other = tokens(encrypt=encrypt, purpose="identity")  # all that they say is the same
        assert reason(other, one.seal(CLAIMS, NOW)) == "signature"
        assert reason(one, other.seal(CLAIMS, NOW)) == "signature"

    def test_a_token_that_is_signed_is_none_that_is_encrypted_and_the_reverse(self) -> None:
        sealed, signs = tokens(encrypt=True), tokens()
        assert reason(signs, sealed.seal(CLAIMS, NOW)) == "key"
        assert reason(sealed, signs.seal(CLAIMS, NOW)) == "key"


class TestEncrypted:
    @pytest.mark.parametrize("place", range(5))
    def test_one_byte_changed_in_each_segment_makes_it_none(self, place: int) -> None:
        one = tokens(encrypt=True)
        parts = one.seal(CLAIMS, NOW).split(".")
        whole = raw(parts[place])
        changes = [
            whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :] for at in range(len(whole)) for bit in (1, 128)
        ]
        for changed in [*changes, whole + b"\0", b"\0" + whole, whole[:-1] if whole else b"\0" * 32]:
            forged = [*parts[:place], segment(changed), *parts[place + 1 :]]
            assert reason(one, ".".join(forged)) != ""

    @pytest.mark.parametrize(
        "members",
        [
            {"enc": "A128GCM"}, {"enc": "A192GCM"}, {"enc": "A128CBC-HS256"}, {"enc": "A256CBC-HS512"}, {"enc": None},
            {"enc": ["A256GCM"]}, {"alg": "A256KW"}, {"alg": "A256GCMKW"}, {"alg": "PBES2-HS256+A128KW"},
            {"alg": "RSA1_5"}, {"alg": "none"}, {"alg": "DIR"}, {"alg": "HS256"}, {"alg": None},
        ],
    )  # fmt: skip
    def test_only_dir_with_a256gcm_is_taken(self, members: dict[str, object]) -> None:
        one = tokens(encrypt=True)
        parts = one.seal(CLAIMS, NOW).split(".")
        document = {"alg": "dir", "enc": "A256GCM", "kid": "HS256", "typ": "gks+jwt", **members}
        assert reason(one, ".".join([segment(as_bytes(document)), *parts[1:]])) == "key"

    @pytest.mark.parametrize(("algorithm", "bytes_"), [("A256KW", 32), ("dir", 16)])
    def test_a_whole_one_of_another_kind_is_refused(self, algorithm: str, bytes_: int) -> None:
        secret = key().derive("session-encrypted", 32)[:bytes_]
        enc = "A256GCM" if bytes_ == 32 else "A128GCM"
        document = {"alg": algorithm, "enc": enc, "kid": "HS256", "typ": "gks+jwt"}
        token = jwe.encrypt_compact(
            document, as_bytes(payload()), jwk.OctKey.import_key(secret), algorithms=[algorithm, enc]
        )
        assert reason(tokens(encrypt=True), token) == "key"

    def test_a_compressed_one_is_refused_before_it_is_opened(self) -> None:
        document = {"alg": "dir", "enc": "A256GCM", "kid": "HS256", "typ": "gks+jwt", "zip": "DEF"}
        secret = jwk.OctKey.import_key(key().derive("session-encrypted"))
        token = jwe.encrypt_compact(
            document, as_bytes(payload(data="x" * 50_000)), secret, algorithms=["dir", "A256GCM", "DEF"]
        )
        assert reason(tokens(encrypt=True), token) == "header"

    def test_what_was_encrypted_twice_differs(self) -> None:
        one = tokens(encrypt=True)
        assert len({one.seal(CLAIMS, NOW).split(".")[2] for _ in range(100)}) == 100


class TestRotation:
    @pytest.mark.parametrize("encrypt", [False, True])
    def test_two_servers_a_deploy_apart_understand_each_other_at_each_step(self, encrypt: bool) -> None:
        old, new = key("HS256", "old"), key("HS256", "new")
        steps = [
            [old],
            [old, in_state(new, KeyState.PENDING)],
            [new, in_state(old, KeyState.RETIRING)],
            [new, in_state(old, KeyState.REVOKED)],
        ]
        for before, after in pairwise(steps[:-1]):
            first, second = tokens(*before, encrypt=encrypt), tokens(*after, encrypt=encrypt)
            assert reason(first, second.seal(CLAIMS, NOW)) == ""
            assert reason(second, first.seal(CLAIMS, NOW)) == ""
        last = tokens(*steps[-1], encrypt=encrypt)
        assert reason(last, tokens(*steps[1], encrypt=encrypt).seal(CLAIMS, NOW)) == "key"
        assert reason(last, tokens(*steps[2], encrypt=encrypt).seal(CLAIMS, NOW)) == ""

    def test_only_what_is_under_a_retiring_key_is_to_be_issued_anew(self) -> None:
        old, new = key("HS256", "old"), key("HS256", "new")
        ahead = tokens(new, in_state(old, KeyState.RETIRING))
        behind = tokens(old, in_state(new, KeyState.PENDING))
        assert ahead.open(behind.seal(CLAIMS, NOW), NOW).is_old
        assert not ahead.open(ahead.seal(CLAIMS, NOW), NOW).is_old
        # Else two servers a deploy apart would each issue anew what the other has just issued.
        assert not behind.open(ahead.seal(CLAIMS, NOW), NOW).is_old

    @pytest.mark.parametrize("encrypt", [False, True])
    def test_a_ring_that_changes_is_heeded_at_once(self, encrypt: bool) -> None:
        old, new = key("HS256", "old"), key("HS256", "new")
        ring = Ring([old])
        one = Tokens(ring, issuer="us", audience="session", longest=LIFE, encrypt=encrypt)
        token = one.seal(CLAIMS, NOW)
        assert reason(one, token) == ""
        ring.replace([new, in_state(old, KeyState.RETIRING)])
        assert one.open(token, NOW).is_old, "and what was remembered is not taken for what it is now"
        ring.replace([new, in_state(old, KeyState.REVOKED)])
        assert reason(one, token) == "key"
        assert reason(one, one.seal(CLAIMS, NOW)) == ""

    def test_a_key_revoked_while_a_token_under_it_is_verified_is_revoked_afterwards(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old, new = key("HS256", "old"), key("HS256", "new")
        ring = Ring([old])
        one = Tokens(ring, issuer="us", audience="session", longest=LIFE)
        token = one.seal(CLAIMS, NOW)
        way = jws.JWSRegistry.algorithms["HS256"]
        verify = way.verify

        def slow(*arguments: Any) -> bool:
            ring.replace([new])
            assert reason(one, "a.a.a") != "", "another thread makes what is of the new ring"
            return verify(*arguments)

        monkeypatch.setattr(way, "verify", slow)
        assert reason(one, token) == "", "it was asked before"
        monkeypatch.undo()
        assert reason(one, token) == "key"

    @pytest.mark.parametrize("encrypt", [False, True])
    def test_a_ring_takes_no_key_that_its_tokens_cannot_use(self, encrypt: bool) -> None:
        ring = Ring([key()])
        one = Tokens(ring, issuer="us", audience="session", longest=LIFE, encrypt=encrypt)
        token = one.seal(CLAIMS, NOW)
        torn = b"-----BEGIN PRIVATE KEY-----\n***\n-----END PRIVATE KEY-----\n"
        with pytest.raises(KeyRingError, match="key torn"):
            ring.replace([key(), Key("torn", "ES256", torn, KeyState.PENDING)])
        assert reason(one, token) == ""
        assert reason(one, one.seal(CLAIMS, NOW)) == ""


class TestKeys:
    @pytest.mark.parametrize(
        ("algorithm", "made"),
        [
            ("RS256", lambda: jwk.RSAKey.generate_key(1024)),
            ("PS256", lambda: jwk.RSAKey.generate_key(2040)),
            ("RS256", lambda: jwk.ECKey.generate_key("P-256")),
            ("ES256", lambda: jwk.ECKey.generate_key("P-384")),
            ("ES256", lambda: jwk.RSAKey.generate_key(2048)),
            ("EdDSA", lambda: jwk.OKPKey.generate_key("Ed448")),
            ("EdDSA", lambda: jwk.OKPKey.generate_key("X25519")),
            ("EdDSA", lambda: jwk.ECKey.generate_key("P-256")),
        ],
    )
    @pytest.mark.filterwarnings("ignore::joserfc.errors.SecurityWarning")
    def test_a_pair_that_is_weak_or_of_another_kind_is_refused_and_not_shown(
        self, algorithm: str, made: Any
    ) -> None:
        pair = made()
        for private in (True, False):
            pem = pair.as_pem(private=private)
            with pytest.raises(KeyRingError, match="key odd: expected") as error:
                tokens(key(), Key("odd", algorithm, pem, KeyState.RETIRING))
            assert pem.decode().split("\n")[1] not in str(error.value)

    @pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
    def test_a_pem_is_no_secret(self, algorithm: str) -> None:
        with pytest.raises(KeyRingError, match="PEM goes with"):
            Key("a", algorithm, public(key("RS256")))

    def test_a_key_that_encrypts_does_so_beside_keys_that_sign_and_never_signs(self) -> None:
        signs, encrypts = key(), key("A256GCM")
        one = tokens(encrypts, in_state(signs, KeyState.RETIRING))
        token, before = one.seal(CLAIMS, NOW), tokens(signs).seal(CLAIMS, NOW)
        assert len(token.split(".")) == 5
        assert one.open(token, NOW)["sub"] == one.open(before, NOW)["sub"] == "ada"
        assert reason(tokens(signs, in_state(encrypts, KeyState.PENDING)), token) == ""
        assert reason(tokens(signs), token) == "key"
        head, *rest = token.split(".")
        for forged in (f"{head}.{'.'.join(before.split('.')[1:])}", f"{before.split('.')[0]}.{'.'.join(rest)}"):
            assert reason(one, forged) == "malformed"
        for algorithm in ("HS256", "dir", "A256GCM"):
            content = f"{segment(as_bytes(header(encrypts, alg=algorithm)))}.{segment(as_bytes(payload()))}"
            for secret in (encrypts.secret, encrypts.derive("session"), encrypts.derive("session-encrypted")):
                signature = hmac.digest(secret, content.encode(), "sha256")
                assert reason(one, f"{content}.{segment(signature)}") in ("key", "header")

    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_nothing_shows_a_secret(self, algorithm: str) -> None:
        one = tokens(key(algorithm), encrypt=True)
        token = one.seal(CLAIMS, NOW)
        with pytest.raises(TokenError) as error:
            one.open(token[:-1], NOW)
        texts = [
            repr(one),
            repr(one.open(token, NOW)),
            repr(key(algorithm)),
            repr(Ring([key(algorithm)])),
            str(error.value),
        ]
        for secret in (key(algorithm).secret, key(algorithm).derive("session-encrypted")):
            for shown in (secret.hex(), segment(secret), repr(secret)[2:-1][:40]):
                assert not any(shown in text for text in texts)
        assert token[-20:-1] not in str(error.value)

    def test_signatures_are_compared_in_constant_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        one = tokens()
        token, compared = one.seal(CLAIMS, NOW), []
        compare = hmac.compare_digest
        monkeypatch.setattr(hmac, "compare_digest", lambda *both: compared.append(both) or compare(*both))  # type: ignore[func-returns-value]
        assert reason(one, token) == ""
        assert len(compared) == 1


class TestRemembered:
    def test_the_same_token_is_verified_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        one = tokens()
        token = one.seal(CLAIMS, NOW)
        claims = one.open(token, NOW)
        monkeypatch.setattr(jws.JWSRegistry.algorithms["HS256"], "verify", None)
        assert one.open(token, NOW + 1) is claims
        assert reason(one, tokens().seal({**CLAIMS, "sub": "bob"}, NOW)) == "signature", "it is not looked up"

    def test_only_what_was_verified_is_remembered(self) -> None:
        one = tokens()
        token = one.seal(CLAIMS, NOW)
        for bad in (
            token[:-1] + "AQgw"[token[-1] == "A"],
            token + ".",
            signed(header(), payload(exp=NOW + LIFE + 1)),
            "",
        ):
            assert reason(one, bad) != ""
            assert reason(one, bad) != ""
        assert not one._known.tokens.fresh

    def test_claims_cannot_be_changed_for_the_next_who_asks(self) -> None:
        one = tokens()
        claims = one.open(one.seal(CLAIMS, NOW), NOW)
        with pytest.raises(TypeError):
            claims["sub"] = "root"  # type: ignore[index]

    def test_it_is_bounded_in_number_and_what_is_asked_for_stays(self) -> None:
        one = tokens()
        kept = one.seal({**CLAIMS, "sub": "kept"}, NOW)
        claims = one.open(kept, NOW)
        for number in range(3 * REMEMBERED):
            one.open(one.seal({"sub": str(number), "exp": NOW + 9}, NOW), NOW)
            if number % 500 == 0:
                assert one.open(kept, NOW) is claims
        known = one._known.tokens
        assert len(known.fresh) + len(known.stale) <= 2 * REMEMBERED

    def test_it_is_bounded_in_characters(self) -> None:
        one = tokens()
        for number in range(2 * REMEMBERED_CHARACTERS // 3500):
            one.open(one.seal({"sub": f"{number}" + "x" * 2400, "exp": NOW + 9}, NOW), NOW)
            known = one._known.tokens
            assert sum(map(len, known.fresh)) == known.characters <= REMEMBERED_CHARACTERS
            assert sum(map(len, known.stale)) <= REMEMBERED_CHARACTERS
        assert known.stale
        before = len(known.fresh)
        assert reason(one, one.seal({"sub": "x" * 9000, "exp": NOW + 9}, NOW)) == ""
        assert len(known.fresh) == before, "a long one is verified each time"


@pytest.mark.parametrize("token", ["", "a.b.c", "%00", "\xff" * 9, "." * 40_000, signed(header(alg="none"), payload()), signed(header(), payload(exp=NOW))], ids=range(7))  # fmt: skip
def test_whatever_came_the_session_is_empty_and_it_is_counted(token: str) -> None:
    """Behind every reason the application sees the same: a client learns nothing of it."""
    flow = TokenSessions(
        tokens(), cookie=Cookie(), idle=LIFE, absolute=LIFE, store=None, clock=lambda: NOW, draw=os.urandom, bearer=True
    )  # fmt: skip
    fields = [(b"authorization", b"Bearer " + token.encode("latin-1", "replace"))]
    session = flow.open(ScopeRequest({"type": "http", "path": "/", "headers": fields}), blocking=True)
    assert dict(session) == {}
    assert run(flow.save(session), nobody) == [(b"vary", b"Authorization")]
    assert sum(flow.counts.values()) == 1
    assert set(flow.counts) <= REASONS


# What is to be fuzzed: each kind, with a valid token of it.
FUZZED = {
    "signed": (tokens(), tokens().seal(CLAIMS, NOW)),
    "ES256": (tokens(key("ES256")), tokens(key("ES256")).seal(CLAIMS, NOW)),
    "EdDSA": (tokens(key("EdDSA")), tokens(key("EdDSA")).seal(CLAIMS, NOW)),
    "encrypted": (tokens(encrypt=True), tokens(encrypt=True).seal(CLAIMS, NOW)),
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from(["alg", "kid", "typ", "enc", "crit", "iss", "aud", "exp", "iat", "sub", "data"]) | st.text(
    max_size=5
)


@st.composite
def mutations(draw: st.DrawFn, token: str) -> str:
    """A valid token, cut, doubled, swapped or changed in some places."""
    for _ in range(draw(st.integers(1, 4))):
        at, end = sorted([draw(st.integers(0, len(token))), draw(st.integers(0, len(token)))])
        middle = draw(
            st.sampled_from(["", token[at:end], token[at:end] * 2, token[at:end][::-1]]) | st.text(max_size=6)
        )
        token = token[:at] + middle + token[end:]
    return token


@pytest.mark.parametrize("kind", FUZZED)
class TestFuzz:
    @settings(deadline=None)
    @given(st.text() | st.binary().map(lambda raw: raw.decode("latin-1")) | st.text("ey.J0-_=", max_size=60))
    def test_no_text_raises_anything_but_a_token_error(self, kind: str, text: str) -> None:
        assert reason(FUZZED[kind][0], text) != ""

    @given(st.data())
    @settings(max_examples=400, deadline=None)
    def test_no_changed_token_says_anything_but_what_was_sealed(self, kind: str, data: st.DataObject) -> None:
        one, token = FUZZED[kind]
        changed = data.draw(mutations(token))
        if reason(one, changed) == "":
            assert changed == token

    @settings(deadline=None)
    @given(
        st.dictionaries(NAMES, JSON, max_size=6), st.dictionaries(NAMES, JSON, max_size=6), st.binary(max_size=80)
    )
    def test_no_document_raises_anything_else(
        self, kind: str, head: dict[str, Any], body: dict[str, Any], rest: bytes
    ) -> None:
        one, token = FUZZED[kind]
        parts = token.split(".")
        mine = json.loads(raw(parts[0]))
        for first in (head, {**mine, **head}):
            changed = [segment(as_bytes(first)), *parts[1:]]
            assert reason(one, ".".join(changed)) != "" or first == mine
            changed[-1] = segment(rest)
            assert reason(one, ".".join(changed)) != ""
        if kind == "signed":
            for second in (body, {**payload(), **body}):
                reason(one, signed(header(), second))
                reason(one, signed({**header(), **head}, second))

    @settings(deadline=None)
    @given(claims=st.dictionaries(st.text(max_size=8), JSON, max_size=5))
    def test_what_can_be_sealed_is_opened_the_same(self, kind: str, claims: dict[str, Any]) -> None:
        one = FUZZED[kind][0]
        try:
            token = one.seal({**claims, "iat": NOW, "exp": NOW + 9}, NOW)
        except ValueError:
            return
        found = dict(one.open(token, NOW))
        assert json.dumps({name: found[name] for name in claims}, sort_keys=True) == json.dumps(
            {**claims, **{name: found[name] for name in ("iat", "exp", "iss", "aud") if name in claims}},
            sort_keys=True,
        )
