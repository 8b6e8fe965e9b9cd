"""Identity tokens of a provider: what is believed of them, and of its keys."""

from __future__ import annotations

import asyncio
import hmac
import json
from base64 import urlsafe_b64encode
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from joserfc import jwk, jws

from gatekeeper.commands import anobody, arun, nobody, run
from gatekeeper.keyfiles import generate
from gatekeeper.keys import KeyState, Ring
from gatekeeper.sessions.foreign import KINDS, ForeignTokens, KeySet, KeySetError, UnknownKey, parse_key_set
from gatekeeper.sessions.tokens import LEEWAY, LONGEST, REASONS, TokenError, Tokens

NOW = 1_800_000_000
ISSUER, AUDIENCE = "https://id.example.com/", "api"


@cache
def pair(kind: str, which: int = 0) -> Any:
    """A key pair, the same for the same words."""
    if kind == "RSA":
        return jwk.RSAKey.generate_key(2048)
    return jwk.OKPKey.generate_key("Ed25519") if kind == "Ed25519" else jwk.ECKey.generate_key(kind)


def published(kind: str, kid: str, which: int = 0, **members: Any) -> dict[str, Any]:
    """A key as a provider publishes it."""
    return {**pair(kind, which).as_dict(private=False), "kid": kid, **members}


def key_set(*members: dict[str, Any]) -> KeySet:
    return parse_key_set(json.dumps({"keys": members}).encode())


def segment(raw: bytes) -> str:
    return urlsafe_b64encode(raw).rstrip(b"=").decode()


def as_bytes(document: object) -> bytes:
    return document if isinstance(document, bytes) else json.dumps(document).encode()


def header(**members: Any) -> dict[str, Any]:
    return {"alg": "ES256", "kid": "P-256", "typ": "JWT", **members}


def payload(**members: Any) -> dict[str, Any]:
    claims = {"iss": ISSUER, "aud": AUDIENCE, "iat": NOW, "exp": NOW + 600, "sub": "ada", "plan": "pro"}
    return {**claims, **members}


def signed(
    head: object = None, body: object = None, *, algorithm: str = "ES256", kind: str = "", which: int = 0
) -> str:
    """A token whose signature is right, whatever it says."""
    head, body = header() if head is None else head, payload() if body is None else body
    content = f"{segment(as_bytes(head))}.{segment(as_bytes(body))}"
    way = jws.JWSRegistry.algorithms[algorithm]
    return f"{content}.{segment(way.sign(content.encode(), pair(kind or KINDS[algorithm], which)))}"


class Published:
    """The keys of a provider, and how often they were asked for. `later` are those it publishes next."""

    def __init__(self, keys: KeySet, later: KeySet | None = None) -> None:
        self.keys = keys
        self.later = later
        self.asked: list[str] = []
        self.due, self.old = later is not None, False

    def is_old(self) -> bool:
        return self.old

    def is_due(self) -> bool:
        return self.due

    def begin(self, nothing: object = None) -> None:
        self.asked.append("begin")

    def refresh(self, nothing: object = None) -> None:
        self.asked.append("refresh")
        self.keys = self.later or self.keys

    async def arefresh(self, nothing: object = None) -> None:
        self.asked.append("arefresh")
        self.keys = self.later or self.keys


ALL = key_set(*(published(kind, kind) for kind in sorted(set(KINDS.values()))))


def foreign(source: Published | None = None, **settings: Any) -> ForeignTokens:
    return ForeignTokens(source or Published(ALL), **{"issuer": ISSUER, "audience": AUDIENCE, **settings})


def reason(opener: ForeignTokens, token: str, now: int = NOW) -> str:
    """Why a token is none; an empty text if it is one."""
    try:
        opener.open(token, now)
    except TokenError as error:
        return error.reason
    return ""


class TestAlgorithms:
    @pytest.mark.parametrize("algorithm", KINDS)
    def test_a_token_is_verified_by_the_key_it_names(self, algorithm: str) -> None:
        token = signed(header(alg=algorithm, kid=KINDS[algorithm]), algorithm=algorithm)
        assert dict(foreign().open(token, NOW)) == payload()
        other = signed(header(alg=algorithm, kid=KINDS[algorithm]), algorithm=algorithm, which=1)
        assert reason(foreign(), other) == "signature"

    @pytest.mark.parametrize("algorithm", KINDS)
    @pytest.mark.parametrize("kind", sorted(set(KINDS.values())))
    def test_a_key_of_another_kind_verifies_nothing(self, algorithm: str, kind: str) -> None:
        if KINDS[algorithm] == kind:
            return
        assert reason(foreign(), signed(header(alg=algorithm, kid=kind), algorithm=algorithm)) == "key"

    def test_only_the_algorithms_that_are_named_are_taken(self) -> None:
        one = foreign(algorithms=["RS256"])
        assert reason(one, signed(header(alg="RS256", kid="RSA"), algorithm="RS256")) == ""
        assert reason(one, signed(header(alg="PS256", kid="RSA"), algorithm="PS256")) == "key"
        assert reason(one, signed()) == "key"

    def test_a_key_that_names_its_algorithm_verifies_no_other(self) -> None:
        one = foreign(Published(key_set(published("RSA", "RSA", alg="RS256"))))
        assert reason(one, signed(header(alg="RS256", kid="RSA"), algorithm="RS256")) == ""
        assert reason(one, signed(header(alg="PS256", kid="RSA"), algorithm="PS256")) == "key"

    @pytest.mark.parametrize(
        "algorithm", ["none", "None", "NONE", "", None, 0, True, ["ES256"], "HS256", "dir", "es256"]
    )
    def test_no_other_algorithm_is_taken(self, algorithm: object) -> None:
        token = signed(header(alg=algorithm))
        assert reason(foreign(), token) == "key"
        assert reason(foreign(), token[: token.rindex(".") + 1]) == "key"

    @pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
    @pytest.mark.parametrize("kind", ["RSA", "P-256", "Ed25519"])
    def test_a_public_key_is_no_secret(self, algorithm: str, kind: str) -> None:
        content = f"{segment(as_bytes(header(alg=algorithm, kid=kind)))}.{segment(as_bytes(payload()))}"
        for secret in (
            pair(kind).as_pem(private=False),
            pair(kind).as_der(private=False),
            json.dumps(published(kind, kind)).encode(),
        ):
            signature = hmac.digest(secret, content.encode(), f"sha{algorithm[2:]}")
            assert reason(foreign(), f"{content}.{segment(signature)}") == "key"


class TestHeader:
    @pytest.mark.parametrize(
        "member", ["crit", "b64", "zip", "jku", "jwk", "x5u", "x5c", "enc", "epk", "cty", "nonce", "iss", ""]
    )
    def test_a_member_that_leads_elsewhere_makes_it_none(self, member: str) -> None:
        values: list[object] = [[], "https://127.0.0.1/keys", published("P-256", "P-256"), None]
        for value in values:
            assert reason(foreign(), signed(header(**{member: value}))) == "header"

    def test_a_key_within_the_header_is_not_taken(self) -> None:
        own = published("P-256", "mine", 1)
        assert reason(foreign(), signed(header(jwk=own), which=1)) == "header"
        assert reason(foreign(), signed(header(kid="mine"), which=1)) == "key"

    def test_thumbprints_are_passed_over(self) -> None:
        assert reason(foreign(), signed(header(**{"x5t": "abc", "x5t#S256": "def"}))) == ""

    @pytest.mark.parametrize("member", ["alg", "kid"])
    def test_a_token_has_to_say_which_key_it_is_under(self, member: str) -> None:
        head = header()
        del head[member]
        assert reason(foreign(), signed(head)) == "header"

    @pytest.mark.parametrize(
        "kid", ["", "p-256", "../P-256", "' OR 1=1", "*", 0, None, True, ["P-256"], {}, "x" * 9000]
    )  # fmt: skip
    def test_a_key_is_found_by_its_own_id_alone(self, kid: object) -> None:
        assert reason(foreign(), signed(header(kid=kid))) == "key"

    @pytest.mark.parametrize(
        ("typ", "why"),
        [
            ("JWT", ""), ("jwt", ""), ("at+jwt", ""), ("application/at+jwt", ""),
            ("gks+jwt", "foreign"), ("gki+jwt", "foreign"), ("logout+jwt", "foreign"), ("dpop+jwt", "foreign"),
            ("", "foreign"), (None, "foreign"), (1, "foreign"), (["JWT"], "foreign"),
        ],
    )  # fmt: skip
    def test_only_tokens_that_tell_an_identity_are_taken(self, typ: object, why: str) -> None:
        """Logout tokens and proofs of DPoP come from the same provider, under the same keys (RFC 8725, 3.11)."""
        assert reason(foreign(), signed(header(typ=typ))) == why

    def test_a_type_may_be_left_out(self) -> None:
        assert reason(foreign(), signed({"alg": "ES256", "kid": "P-256"})) == ""

    def test_one_that_is_too_long_or_of_another_form_is_none(self) -> None:
        assert reason(foreign(), signed(body=payload(text="x" * LONGEST))) == "long"
        token = signed()
        for other in (
            "",
            ".",
            token + ".",
            token + "=",
            token + "\n",
            f"{token}.a.b",
            token.partition(".")[2],
        ):
            assert reason(foreign(), other) == "malformed"

    def test_our_own_sessions_are_no_identity_of_theirs(self) -> None:
        own = Tokens(Ring([generate("ES256", KeyState.ACTIVE)]), issuer=ISSUER, audience=AUDIENCE, longest=600)
        assert reason(foreign(), own.seal({"exp": NOW + 9}, NOW)) == "foreign"


class TestClaims:
    @pytest.mark.parametrize("issuer", ["", ISSUER.rstrip("/"), ISSUER.upper(), ISSUER + "x", [ISSUER], None, True])
    def test_another_issuer_is_foreign(self, issuer: object) -> None:
        assert reason(foreign(), signed(body=payload(iss=issuer))) == "foreign"

    @pytest.mark.parametrize(
        "audience", ["", "other", "API", "api ", "apis", [], ["other"], [["api"]], {"api": 1}, None, 0]
    )
    def test_a_token_for_another_audience_is_foreign(self, audience: object) -> None:
        """Else any service to which a user logs in could come here in their name."""
        assert reason(foreign(), signed(body=payload(aud=audience))) == "foreign"

    def test_of_several_audiences_ours_is_one(self) -> None:
        assert reason(foreign(), signed(body=payload(aud=["other", AUDIENCE]))) == ""

    @pytest.mark.parametrize("name", ["iss", "aud", "exp"])
    def test_what_is_needed_has_to_be_there(self, name: str) -> None:
        body = payload()
        del body[name]
        assert reason(foreign(), signed(body=body)) in ("foreign", "claims")

    @pytest.mark.parametrize("name", ["exp", "iat", "nbf"])
    @pytest.mark.parametrize("value", list[object]([True, False, None, str(NOW), [NOW], {}, ""]))
    def test_times_are_numbers(self, name: str, value: object) -> None:
        assert reason(foreign(), signed(body=payload(**{name: value}))) == "claims"

    def test_times_may_have_a_fraction(self) -> None:
        assert reason(foreign(), signed(body=payload(iat=NOW - 0.5, exp=NOW + 0.5, nbf=float(NOW)))) == ""

    def test_it_is_good_for_a_minute_longer_than_it_says_and_not_more(self) -> None:
        one, token = foreign(), signed(body=payload(exp=NOW))
        for _ in range(2):  # the second time it is looked up
            assert reason(one, token, NOW + LEEWAY - 1) == ""
            assert reason(one, token, NOW + LEEWAY) == "expired"

    @pytest.mark.parametrize("name", ["iat", "nbf"])
    def test_its_clock_may_be_a_minute_ahead_and_not_more(self, name: str) -> None:
        one, token = foreign(), signed(body=payload(**{"iat": NOW - 900, name: NOW}))
        for _ in range(2):
            assert reason(one, token, NOW - LEEWAY) == ""
            assert reason(one, token, NOW - LEEWAY - 1) == "early"

    @pytest.mark.parametrize(
        "body",
        [
            b"", b"[]", b"null", b"{", b"\xff", b'{"exp":NaN}', b'{"exp":1e999}', b"[" * 9000,
            json.dumps(payload()).encode()[:-1] + b',"sub":"root"}',
        ],
    )  # fmt: skip
    def test_what_is_no_object_or_says_a_thing_twice_is_none(self, body: bytes) -> None:
        assert reason(foreign(), signed(body=body)) == "claims"

    def test_a_header_that_says_a_thing_twice_is_none(self) -> None:
        head = json.dumps(header()).encode()[:-1] + b',"kid":"RSA"}'
        assert reason(foreign(), signed(head)) == "header"

    def test_what_it_says_cannot_be_changed_for_the_next_who_asks(self) -> None:
        with pytest.raises(TypeError):
            foreign().open(signed(), NOW)["sub"] = "root"  # type: ignore[index]


class TestKeySets:
    @pytest.mark.parametrize(
        "raw",
        [
            b"", b"null", b"[]", b"{}", b'{"keys":null}', b'{"keys":{}}', b"<html>", b"\xff", b'{"keys":[],"keys":[]}',
            b'{"keys":' * 3000,
        ],
    )  # fmt: skip
    def test_what_is_no_set_is_a_clear_error(self, raw: bytes) -> None:
        with pytest.raises(KeySetError, match="JWK Set"):
            parse_key_set(raw)

    @pytest.mark.parametrize(
        "member",
        [
            7, None, [], {}, {"kty": "oct", "kid": "a", "k": segment(b"k" * 32)}, {"kty": "RSA", "kid": "a"},
            {"kty": ["RSA"], "kid": "a"}, {"kty": "RSA", "kid": "a", "n": 7, "e": "AQAB"},
            {"kty": "EC", "kid": "a", "crv": "P-256", "x": "AAAA", "y": "AAAA"},
            {"kty": "EC", "kid": "a", "crv": "P-192", "x": "AAAA", "y": "AAAA"},
            {"kty": "OKP", "kid": "a", "crv": "Ed25519", "x": "AAAA"},
            published("P-256", "a", use="enc"), published("P-256", "a", key_ops=["encrypt"]),
            published("P-256", "a", key_ops="verify"), published("P-256", "a", alg=7), {**published("P-256", "a"), "kid": 7},
            {**pair("P-256").as_dict(private=True), "kid": "a"},
        ],
    )  # fmt: skip
    def test_a_key_of_no_use_is_left_out_and_the_others_are_read(self, member: Any) -> None:
        assert set(key_set(member, published("P-256", "b"))) == {"b"}

    @pytest.mark.filterwarnings("ignore::joserfc.errors.SecurityWarning")
    def test_a_weak_key_or_one_of_another_curve_is_left_out(self) -> None:
        made: tuple[Any, ...] = (
            jwk.RSAKey.generate_key(1024),
            jwk.ECKey.generate_key("secp256k1"),
            jwk.OKPKey.generate_key("X25519"),
            jwk.OKPKey.generate_key("Ed448"),
        )
        for number, one in enumerate(made):
            assert not key_set({**one.as_dict(private=False), "kid": str(number)})

    def test_keys_of_different_kinds_may_have_one_id(self) -> None:
        one = foreign(Published(key_set(published("RSA", "a"), published("P-256", "a"))))
        assert reason(one, signed(header(kid="a"))) == ""
        assert reason(one, signed(header(kid="a", alg="PS256"), algorithm="PS256")) == ""

    def test_of_two_keys_that_cannot_be_told_apart_the_first_is_taken(self) -> None:
        one = foreign(Published(key_set(published("P-256", "a"), published("P-256", "a", 1))))
        assert reason(one, signed(header(kid="a"))) == ""
        assert reason(one, signed(header(kid="a"), which=1)) == "signature"

    def test_so_many_are_looked_at(self) -> None:
        assert len(key_set(*(published("P-256", str(number)) for number in range(500)))) == 128


class TestAsking:
    def test_a_token_under_a_known_key_asks_nobody(self) -> None:
        source = Published(ALL, ALL)
        assert run(foreign(source).claims(signed(), NOW, blocking=True), nobody) == payload()
        assert source.asked == []

    @pytest.mark.parametrize("blocking", [True, False])
    def test_an_unknown_key_is_asked_for_once(self, blocking: bool) -> None:
        source = Published({}, ALL)
        one = foreign(source)
        steps = one.claims(signed(), NOW, blocking=blocking)
        found = run(steps, nobody) if blocking else asyncio.run(arun(steps, anobody))
        assert found == payload()
        assert source.asked == ["refresh" if blocking else "arefresh"]

    def test_one_that_is_unknown_still_is_none(self) -> None:
        source = Published({}, {})
        one = foreign(source)
        assert run(one.claims(signed(), NOW, blocking=True), nobody) is None
        assert source.asked == ["refresh"]
        assert one.counts == {"key": 1}

    def test_nobody_is_asked_more_often_than_the_source_allows(self) -> None:
        source = Published({})
        one = foreign(source)
        assert run(one.claims(signed(), NOW, blocking=True), nobody) is None
        assert source.asked == []
        with pytest.raises(UnknownKey):
            one.open(signed(), NOW)

    def test_keys_that_were_read_meanwhile_for_somebody_else_are_looked_into(self) -> None:
        class Late(Published):
            def is_due(self) -> bool:
                self.keys = ALL
                return False

        assert run(foreign(Late({})).claims(signed(), NOW, blocking=True), nobody) == payload()

    @pytest.mark.parametrize(
        "token", ["", "a.b.c", signed(header(alg="none")), signed(header(alg="HS256", kid="new")), signed(header(kid=7)),
                  signed(header(kid="new", jku="x")), signed(body=payload(aud="other"))],
        ids=range(7),
    )  # fmt: skip
    def test_what_can_never_be_a_token_asks_nobody(self, token: str) -> None:
        source = Published(ALL, ALL)
        one = foreign(source)
        assert run(one.claims(token, NOW, blocking=True), nobody) is None
        assert source.asked == []
        assert sum(one.counts.values()) == 1
        assert set(one.counts) <= REASONS

    def test_keys_that_are_old_are_read_again_and_not_waited_for(self) -> None:
        source = Published(ALL, ALL)
        source.old = True
        assert run(foreign(source).claims(signed(), NOW, blocking=True), nobody) is not None
        assert source.asked == ["begin"]

    def test_the_same_token_is_verified_once_as_long_as_the_keys_are_the_same(self) -> None:
        source = Published(ALL)
        one = foreign(source)
        token = signed()
        claims = one.open(token, NOW)
        assert one.open(token, NOW + 1) is claims
        source.keys = key_set(published("RSA", "RSA"))
        assert reason(one, token) == "key", "a key that its provider took back is not good for what was seen before"


JSON = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.lists(st.text(max_size=3))
)
NAMES = st.sampled_from(["alg", "kid", "typ", "iss", "aud", "exp", "iat", "nbf", "crit"]) | st.text(max_size=4)


class TestFuzz:
    @settings(deadline=None)
    @given(st.text() | st.binary().map(lambda raw: raw.decode("latin-1")) | st.text("ey.J0-_=", max_size=60))
    def test_no_text_raises_anything_but_a_token_error(self, text: str) -> None:
        assert reason(foreign(), text) in REASONS

    @settings(deadline=None)
    @given(
        st.dictionaries(NAMES, JSON, max_size=6), st.dictionaries(NAMES, JSON, max_size=6), st.binary(max_size=80)
    )
    def test_no_document_raises_anything_else(
        self, head: dict[str, Any], body: dict[str, Any], rest: bytes
    ) -> None:
        one = foreign()
        assert reason(one, f"{segment(as_bytes(head))}.{segment(as_bytes(body))}.{segment(rest)}") in REASONS
        reason(one, signed({**header(), **head}, {**payload(), **body}))

    @settings(deadline=None, max_examples=200)
    @given(st.data())
    def test_no_changed_token_is_taken(self, data: st.DataObject) -> None:
        token = CHANGED
        at = data.draw(st.integers(0, len(token) - 1))
        other = token[:at] + data.draw(st.text(max_size=3)) + token[at + data.draw(st.integers(0, 3)) :]
        assert other == token or reason(foreign(), other) in REASONS

    @settings(deadline=None)
    @given(st.dictionaries(NAMES, JSON) | st.lists(st.dictionaries(st.sampled_from(["kty", "kid", "crv", "x", "y", "n", "e", "use", "d"]), JSON | st.sampled_from(["RSA", "EC", "OKP", "P-256", "AQAB"]))))  # fmt: skip
    def test_no_set_of_keys_raises_anything_else(self, members: Any) -> None:
        try:
            parse_key_set(json.dumps({"keys": members}).encode())
        except KeySetError:
            pass


CHANGED = signed()
