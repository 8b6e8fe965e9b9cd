"""Batches as commands of the server, and its answers as verdicts. Nothing here reads or writes a socket."""

from __future__ import annotations

import hashlib
from binascii import crc_hqx
from collections.abc import Callable, Sequence
from pathlib import Path
from struct import Struct
from typing import Any, Final

from gatekeeper.commands import NEVER, Batch, Hits, Limit, Replies, Verdict

LONGEST_KEY: Final = 200
"""Keys of more bytes than this are digested, unless they are to be listed."""

SLOTS: Final = 16384

_EXACT: Final = 1 << 52
_KINDS: Final = {
    "sliding_window": 1,
    "concurrency": 2,
    "gcra": 3,
    "sliding_counter": 4,
    "fixed_window": 5,
    "penalty": 6,
}
_SPEC: Final = Struct("<BBdddddd").pack
_HEAD: Final = Struct("<dBIII").pack

_SHORT: Final = 17


def _part(name: str) -> bytes:
    return Path(__file__).with_name(f"{name}.lua").read_bytes()


_HEAD_PART: Final = _part("head")
_KIND_PARTS: Final = {kind: _part(kind) for kind in _KINDS}
_BATCH_PART: Final = _part("batch")


_SCRIPTS: Final[dict[int, Script]] = {}
_BY_SHA: Final[dict[bytes, Script]] = {}


class Script:
    """A script, with the beginnings of its calls."""

    __slots__ = ("by_sha", "heads", "sha", "text")

    def __init__(self, text: bytes) -> None:
        self.text = text
        self.sha = hashlib.sha1(self.text, usedforsecurity=False).hexdigest().encode("ascii")
        self.by_sha = b"$7\r\nEVALSHA\r\n$40\r\n%b\r\n" % self.sha
        # By the number of hits, of batches that are but hits.
        self.heads = [self.head(count, 0) for count in range(_SHORT)]
        _BY_SHA[self.sha] = self

    def head(self, count: int, words: int) -> bytes:
        """What comes before the keys, of which there are `count`, and `words` besides those and what they need."""
        return b"*%d\r\n%b$%d\r\n%d\r\n" % (3 + 2 * count + words, self.by_sha, len(str(count)), count)

    def call(self, keys: Sequence[bytes], words: Sequence[bytes]) -> bytes:
        """A call for these keys, with these words besides."""
        return command(b"EVALSHA", self.sha, b"%d" % len(keys), *keys, *words)


def script_of(kinds: int) -> Script:
    """The script for batches of these kinds."""
    script = _SCRIPTS.get(kinds)
    if script is None:
        # Concurrency is a sliding window.
        wanted = kinds | 1 if kinds & 2 else kinds
        parts = [_KIND_PARTS[kind] for kind, number in _KINDS.items() if wanted >> number - 1 & 1]
        script = _SCRIPTS[kinds] = Script(b"\n".join([_HEAD_PART, *parts, _BATCH_PART]))
    return script


def command(*words: bytes) -> bytes:
    """A command in the server's protocol (RESP)."""
    return b"*%d\r\n" % len(words) + b"".join([b"$%d\r\n%b\r\n" % (len(word), word) for word in words])


def with_script(packet: bytes) -> bytes:
    """A call of a script by its digest as one that brings the script: for a server that does not know it (yet)."""
    script = _BY_SHA[packet.split(b"\r\n", 5)[4]]
    return packet.replace(script.by_sha, b"$4\r\nEVAL\r\n$%d\r\n%b\r\n" % (len(script.text), script.text), 1)


def tag_of(key: str, *, listed: bool) -> bytes:
    """A key's text as it stands between the braces that decide its slot: any text, each another tag.

    The counters of one client under several rules have one tag, so that its requests ask one node of a cluster.
    """
    raw = key.encode("utf-8", "surrogatepass")
    if len(raw) > LONGEST_KEY and not listed:
        return b"%blake2b:" + hashlib.blake2b(raw, digest_size=20).hexdigest().encode("ascii")
    if b"{" in raw or b"}" in raw or b"%" in raw:
        raw = raw.replace(b"%", b"%25").replace(b"{", b"%7B").replace(b"}", b"%7D")
    return raw or b"%"  # of an empty tag a cluster takes the whole key


def text_of(tag: bytes) -> str | None:
    """The key of a tag of a listed limit; None for what is no such tag, but the text of somebody else's key."""
    if tag == b"%":
        return ""
    raw = tag.replace(b"%7D", b"}").replace(b"%7B", b"{").replace(b"%25", b"%")
    try:
        text = raw.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return None
    return text if tag_of(text, listed=True) == tag else None


def slot_of(tag: bytes) -> int:
    """The slot of a cluster that a tag falls into (CRC16 of XMODEM, as the cluster specification says)."""
    return crc_hqx(tag, 0) % SLOTS


class _Spec:
    """How the keys of a limit are told to the script: what comes before and after the tag, and its numbers."""

    __slots__ = ("after", "bit", "costs", "kind", "lifetime_ms", "listed", "numbers", "shadow", "told")

    def __init__(self, limit: Limit, slack_ms: int) -> None:
        self.told = limit.numbers
        self.shadow = limit.shadow
        self.listed = limit.listed
        self.after = b"}:" + limit.space.encode("utf-8", "surrogatepass")
        self.kind = _KINDS[limit.kind]
        self.bit = 1 << self.kind - 1
        self.numbers, lifetime_ns = _in_microseconds(limit)
        # The millisecond more is for the server's own, which are those of whole ones.
        self.lifetime_ms = -(-lifetime_ns // 1_000_000) + 1 + slack_ms
        self.costs: dict[int, bytes] = {}

    def of(self, cost: int) -> bytes:
        packed = self.costs.get(cost)
        if packed is None:
            # A cost above every limit is refused, however far above: what no double holds is as good as 2^52.
            numbers = (min(cost, _EXACT), self.lifetime_ms, *self.numbers)
            packed = b"$50\r\n%b\r\n" % _SPEC(self.kind, self.shadow, *numbers)
            if len(self.costs) >= 64:
                self.costs.clear()
            self.costs[cost] = packed
        return packed


def _in_microseconds(limit: Limit) -> tuple[tuple[int, int, int, int], int]:
    """(the numbers of the algorithm in the units of its Lua twin, its lifetime in nanoseconds)

    Periods that are not whole microseconds are rounded up, so that none ends early.
    """
    first, *rest = limit.numbers
    if limit.kind != "gcra":
        one, two, three = (*(-(-number // 1000) for number in rest), 0, 0, 0)[:3]
        return (first, one, two, three), limit.lifetime_ns
    (emission,) = rest
    if first * emission <= _EXACT:
        return (first, emission, 1000, 0), limit.lifetime_ns
    emission = -(-emission // 1000)
    return (first, emission, 1, 0), first * emission * 1000


class Packer:
    """Makes the calls of the script.

    - `prefix` begins every key.
    - `clock` gives nanoseconds in place of the server's own time, for tests; states are then kept for an hour more,
      for time that stands still on that clock goes on at the server.
    """

    def __init__(self, prefix: str, clock: Callable[[], int] | None) -> None:
        self._before = prefix.encode("utf-8", "surrogatepass") + b":{"
        self._clock = clock
        self._slack_ms = 3_600_000 if clock is not None else 0
        self._specs: dict[Limit, _Spec] = {}

    def pack(self, batch: Hits) -> bytes:
        """The call that carries out a batch."""
        if self._clock is not None or batch.__class__ is not list:
            return self._pack_all(batch)
        keys = specs = b""
        kinds = 0
        before = self._before
        for limit, key, cost in batch:
            try:
                spec = self._specs[limit]
                if spec.shadow is not limit.shadow:
                    spec = self._spec(limit)
            except KeyError:
                spec = self._spec(limit)
            kinds |= spec.bit
            name = b"%b%b%b" % (before, tag_of(key, listed=spec.listed), spec.after)
            keys += b"$%d\r\n%b\r\n" % (len(name), name)
            specs += spec.costs.get(cost) or spec.of(cost)
        script = _SCRIPTS.get(kinds) or script_of(kinds)
        count = len(batch)
        return (script.heads[count] if count < _SHORT else script.head(count, 0)) + keys + specs

    def tags(self, batch: Hits) -> tuple[list[bytes], list[bytes], list[bytes], list[bytes]]:
        """The tags of a batch: of its gives, resets, takes and hits."""
        if batch.__class__ is list:
            return [], [], [], [tag_of(key, listed=limit.listed) for limit, key, _ in batch]
        assert isinstance(batch, Batch)
        return (
            [tag_of(key, listed=limit.listed) for limit, key, _, _ in batch.gives],
            [tag_of(key, listed=limit.listed) for limit, key in batch.resets],
            [tag_of(key, listed=limit.listed) for limit, key, _ in batch.takes],
            [tag_of(key, listed=limit.listed) for limit, key, _ in batch],
        )

    def pattern(self, limit: Limit) -> tuple[bytes, bytes, bytes]:
        """(the glob that all keys of a limit match, what they begin with, what they end with)"""
        after = self._spec(limit).after
        return _literal(self._before) + b"*" + _literal(after), self._before, after

    def _pack_all(self, batch: Hits) -> bytes:
        gives: Sequence[tuple[Limit, str, int, Any]] = ()
        resets: Sequence[tuple[Limit, str]] = ()
        takes: Hits | Sequence[tuple[Limit, str, int]] = ()
        spend = True
        if batch.__class__ is not list:
            assert isinstance(batch, Batch)
            gives, resets, takes, spend = batch.gives, batch.resets, batch.takes, batch.spend
        keys, specs = [], []
        kinds = 0
        commands = [
            *((limit, key, cost) for limit, key, cost, _ in gives),
            *((limit, key, 0) for limit, key in resets),
            *takes,
            *batch,
        ]
        for limit, key, cost in commands:
            spec = self._specs.get(limit)
            if spec is None or spec.shadow is not limit.shadow:
                spec = self._spec(limit)
            kinds |= spec.bit
            name = b"%b%b%b" % (self._before, tag_of(key, listed=spec.listed), spec.after)
            keys.append(b"$%d\r\n%b\r\n" % (len(name), name))
            specs.append(spec.of(cost))
        now = -1.0 if self._clock is None else float(self._clock() // 1000)
        words = [_HEAD(now, spend, len(gives), len(resets), len(takes))]
        for *_, receipt in gives:
            words.append(receipt if receipt.__class__ is bytes else b"%d" % receipt)
        return b"".join(
            [
                script_of(kinds).head(len(commands), len(words)),
                *keys,
                *specs,
                *[b"$%d\r\n%b\r\n" % (len(word), word) for word in words],
            ]
        )

    def _spec(self, limit: Limit) -> _Spec:
        spec = self._specs.get(limit)
        if spec is None or spec.shadow is not limit.shadow or spec.told != limit.numbers:
            if len(self._specs) >= 4096:  # the limits of settings that were replaced
                self._specs.clear()
            spec = self._specs[limit] = _Spec(limit, self._slack_ms)
        return spec


def verdicts(batch: Hits, answer: Sequence[Any]) -> Replies:
    """What the script answered to a batch."""
    replies: Replies = []
    at = 0
    for limit, _, _ in batch:
        wait = answer[at + 2]
        if not wait:
            replies.append(Verdict(True, limit.numbers[0], answer[at], answer[at + 1], 0, answer[at + 3]))
        else:
            replies.append(
                Verdict(False, limit.numbers[0], answer[at], answer[at + 1], NEVER if wait < 0 else wait, None)
            )
        at += 4
    return replies


def _literal(text: bytes) -> bytes:
    """A text in which nothing has a meaning of its own in a glob."""
    for mark in (b"\\", b"*", b"?", b"[", b"]", b"^"):
        text = text.replace(mark, b"\\" + mark)
    return text
