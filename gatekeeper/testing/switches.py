"""What tests switch in Gatekeepers that an application made for itself: their store, and whether they limit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

from gatekeeper.commands import Store
from gatekeeper.keeper import KEEPERS, Gatekeeper
from gatekeeper.limiter import Limiter
from gatekeeper.testing.clock import VirtualClock, virtual_store

Target: TypeAlias = Any
"""A Gatekeeper, or what has one as its attribute `keeper`, as all our middleware does."""


@contextmanager
def virtual(*targets: Target, clock: VirtualClock | None = None) -> Iterator[VirtualClock]:
    """While it lasts, count in fresh memory on a virtual clock, whatever store the settings name::

        with virtual() as clock:
            ...
            clock.advance(60)

    - `targets`: Gatekeepers, middleware or Limiters. Without any: each Gatekeeper of this process, also those
      that are made meanwhile. (A store that a test itself gave on the same clock, it keeps.)
    - `clock`: a new one if none is given. It is what `as` names.

    Gatekeepers whose settings name the same server go on sharing their counters. Afterwards each has the store
    it had before, as it was. A gateway in a process of its own is not reached. It is a decorator, too.

    Raises TypeError for a target that has no Gatekeeper.
    """
    time = VirtualClock() if clock is None else clock
    shared: dict[str, Store] = {}

    def store_for(keeper: Gatekeeper) -> Store:
        settings = keeper.settings.store
        url = settings.url or "memory://"
        if url == "memory://":  # each has a memory of its own
            return virtual_store(time, max_keys=settings.max_keys)
        return shared.setdefault(url, virtual_store(time, max_keys=settings.max_keys))

    with ExitStack() as stack:

        def adopt(target: Gatekeeper | Limiter) -> None:
            if isinstance(target, Limiter):
                stack.callback(setattr, target, "store", target.store)
                target.store = virtual_store(time)
            elif getattr(target.store, "_clock", None) is not time:
                stack.callback(target.use, target.use(store_for(target)))

        _each(targets, adopt, stack)
        yield time


@contextmanager
def disabled(*targets: Target) -> Iterator[None]:
    """While it lasts, nothing is limited and nothing counted: all requests and calls pass.

    `targets` as of `virtual`, without Limiters. Raises TypeError for what has no Gatekeeper.
    """
    with _switched(targets, False):
        yield


@contextmanager
def enabled(*targets: Target) -> Iterator[None]:
    """While it lasts, limits count, even if `disabled` or the settings have switched them off."""
    with _switched(targets, True):
        yield


@contextmanager
def _switched(targets: tuple[Target, ...], wanted: bool) -> Iterator[None]:
    with ExitStack() as stack:

        def switch(target: Gatekeeper | Limiter) -> None:
            if isinstance(target, Limiter):
                raise TypeError("expected a Gatekeeper: a Limiter has no switch")
            stack.callback(setattr, target, "enabled", target.enabled)
            target.enabled = wanted

        _each(targets, switch, stack)
        yield


def _each(targets: tuple[Target, ...], act: Callable[[Gatekeeper | Limiter], None], stack: ExitStack) -> None:
    """Act on each target; without any, on all Gatekeepers, and until `stack` ends on each that is made."""
    if targets:
        for target in [_found(target) for target in targets]:
            act(target)
        return
    for keeper in list(KEEPERS):
        act(keeper)
    made = Gatekeeper.__init__

    @functools.wraps(made)
    def make(self: Gatekeeper, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        act(self)

    stack.callback(setattr, Gatekeeper, "__init__", made)
    Gatekeeper.__init__ = make  # type: ignore[method-assign]


def _found(target: Target) -> Gatekeeper | Limiter:
    for found in (target, getattr(target, "keeper", None)):
        if isinstance(found, Gatekeeper | Limiter):
            return found
    raise TypeError(f"expected a Gatekeeper, our middleware or a Limiter, not {type(target).__name__}")
