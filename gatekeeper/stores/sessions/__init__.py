"""Where sessions live: each store answers the same commands, and passes the same contract test."""

from __future__ import annotations

from typing import Final

from gatekeeper.errors import StoreError

LONGEST: Final = 1 << 20
"""The bytes that a session may have in any store: what goes into one can be moved to another."""


def too_long(data: bytes) -> StoreError:
    return StoreError(f"a session of {len(data)} bytes: expected at most {LONGEST}; keep large things elsewhere")
