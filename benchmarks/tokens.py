"""A session's token: `Tokens.open` and `joserfc.jwt.decode` with `JWTClaimsRegistry.validate`.

The same tokens on both sides, 2,000 of them with about 400 bytes of claims, under the same key; both verify, and
check issuer, audience, `exp` and `iat`. Ours refuses besides what RFC 8725 has refused (members that stand twice,
other types and fields of the header). It meets each token once, so that nothing is looked up.

Then the same tokens again, as a browser sends them: ours looks them up and checks their time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from statistics import median
from typing import Any, Final

from benchmarks.measure import Progress, Result, Row, Skipped, Unfit, Work, interleave, median_ratio, peer
from gatekeeper.keys import Key, KeyState, Ring
from gatekeeper.sessions.tokens import REMEMBERED, TokenError, Tokens, asymmetric

LIFE: Final = 3600
COUNT: Final = 2000
BAR: Final = 1 / 1.3

Opener = Callable[[str], Mapping[str, Any]]


def run(quick: bool, progress: Progress) -> Result:
    against = peer("joserfc")
    rounds, count = (3, 200) if quick else (9, COUNT)
    assert count <= REMEMBERED, "what is looked up has to be there"
    rows = []
    for name, algorithm, encrypt in (
        ("HS256", "HS256", False),
        ("ES256", "ES256", False),
        ("encrypted", "HS256", True),
    ):
        ring = Ring([made(algorithm)])
        now = int(time.time())
        texts = sealed(ours(ring, encrypt), count, now)
        theirs = decoder(ring.active, encrypt)
        verify(ours(ring, encrypt), theirs, texts, now)
        seconds = interleave(
            lambda number, ring=ring, encrypt=encrypt, theirs=theirs, texts=texts, now=now: works(  # type: ignore[misc]
                ours(ring, encrypt), theirs, texts, now
            ),
            rounds,
            progress=lambda text, name=name: progress(f"{name}: {text}"),  # type: ignore[misc]
        )
        rows.append(
            Row(
                what=f"token, {name}: verified, against {against}",
                unit="µs",
                ours=median(seconds["ours"]) / count * 1e6,
                peer=median(seconds["theirs"]) / count * 1e6,
                ratio=median_ratio(seconds["theirs"], seconds["ours"]),
                at_least=round(BAR, 2),
            )
        )
        rows.append(
            Row(
                what=f"token, {name}: the same again",
                unit="µs",
                ours=median(seconds["again"]) / count * 1e6,
                at_most=3.0,
            )
        )
    return Result(rows)


def made(algorithm: str) -> Key:
    try:
        return import_module("gatekeeper.keyfiles").generate(algorithm, KeyState.ACTIVE)  # type: ignore[no-any-return]
    except ImportError as error:
        raise Skipped(str(error)) from None


def ours(ring: Ring, encrypt: bool) -> Tokens:
    """One that has seen no token yet."""
    return Tokens(ring, issuer="gatekeeper", audience="session", longest=LIFE, encrypt=encrypt)


def sealed(tokens: Tokens, count: int, now: int) -> list[str]:
    return [
        tokens.seal(
            {
                "exp": now + LIFE,
                "born": now,
                "sid": f"{number:022d}",
                "sub": f"user{number}",
                "data": {"sub": f"user{number}", "cart": [{"id": 1000 + at, "count": at} for at in range(8)]},
            },
            now,
        )
        for number in range(count)
    ]


def decoder(key: Key, encrypt: bool) -> Opener:
    """joserfc's way of opening one, with all that can be made before made before."""
    jwt, jwk, jws, jwe = (import_module(f"joserfc.{name}") for name in ("jwt", "jwk", "jws", "jwe"))
    claims = jwt.JWTClaimsRegistry(
        leeway=60,
        iss={"essential": True, "value": "gatekeeper"},
        aud={"essential": True, "value": "session"},
        exp={"essential": True},
        iat={"essential": True},
    )
    if encrypt:
        material = jwk.OctKey.import_key(key.derive("session-encrypted"))
        registry = jwe.JWERegistry(algorithms=["dir", "A256GCM"])
    else:
        material = jwk.OctKey.import_key(key.derive("session")) if key.is_symmetric else asymmetric(key)
        registry = jws.JWSRegistry(algorithms=[key.algorithm])

    def decode(text: str) -> Mapping[str, Any]:
        token = jwt.decode(text, material, registry=registry)
        claims.validate(token.claims)
        return token.claims  # type: ignore[no-any-return]

    return decode


def works(tokens: Tokens, theirs: Opener, texts: Sequence[str], now: int) -> Mapping[str, Work]:
    def opened_by_ours(texts: Sequence[str]) -> None:
        for text in texts:
            tokens.open(text, now)["sid"]

    def opened_by_theirs() -> None:
        for text in texts:
            theirs(text)["sid"]

    again = [f"{text[:8]}{text[8:]}" for text in texts]  # as each request has a text of its own, not hashed yet
    return {
        "ours": lambda: opened_by_ours(texts),
        "theirs": opened_by_theirs,
        "again": lambda: opened_by_ours(again),
    }


def verify(tokens: Tokens, theirs: Opener, texts: Sequence[str], now: int) -> None:
    """Both read the same of each token, and neither takes one that was changed. Raises Unfit."""
    if any(dict(tokens.open(text, now)) != dict(theirs(text)) for text in texts[:100]):
        raise Unfit("the claims are not the same")
    head, _, tail = texts[0].rpartition(".")
    changed = f"{head}.{'B' if tail[0] == 'A' else 'A'}{tail[1:]}"
    try:
        tokens.open(changed, now)
    except TokenError:
        pass
    else:
        raise Unfit("ours takes a changed token")
    try:
        theirs(changed)
    except Exception:  # of several kinds
        return
    raise Unfit("theirs takes a changed token")
