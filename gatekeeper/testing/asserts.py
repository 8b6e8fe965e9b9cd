"""Assertions on an application as its clients see it, through whatever test client its framework has.

    assert_limited(client, "POST /login", after=5)

What is asserted is a generator that yields "send a request" and is sent the answer; a blocking and an awaiting
driver send. Of a client only its methods are looked at, so that no framework is imported here.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator
from inspect import isawaitable
from typing import Any, Final, TypeAlias

from gatekeeper.testing.clock import VirtualClock

Client: TypeAlias = Any
"""A test client: `generic` (Django's), `open` (Werkzeug's, Flask's) or `request` (Starlette's, httpx)."""

Response: TypeAlias = Any
"""What the client answers."""

_TOLD: Final = ("Retry-After", "RateLimit", "RateLimit-Policy")
_FEW: Final = 8


def assert_limited(
    client: Client,
    target: str,
    after: int,
    *,
    status: int = 429,
    clock: VirtualClock | None = None,
    **request: Any,
) -> Response:
    """Assert that `after` requests pass and the next is refused, and told when to return.

    - `client`: the test client of Starlette, FastAPI, Flask, Werkzeug or Django, an httpx.Client, or another
      with one of their methods. For an asynchronous one: `aassert_limited`.
    - `target`: method and path, "POST /login"; a path alone is a GET.
    - `after`: how many requests pass, whatever they are answered; 0 if the quota is spent already.
    - `status`: what refuses (default 429).
    - `clock`: the virtual clock that the application's limits live by. Given one, it is advanced by what
      `Retry-After` says, and the next request must pass.
    - All else is handed to the client: `json=…`, `headers=…`. Redirects are not followed.

    The result is the client's response to the refused request. Raises AssertionError that says what came instead,
    and TypeError for what is no such client.
    """
    __tracebackhide__ = True
    return _run(_limited(_Requests(client, target, request), after, status, clock))


def assert_not_limited(client: Client, target: str, times: int = 100, *, status: int = 429, **request: Any) -> None:
    """Assert that `times` requests pass, one after the other. Arguments are as of `assert_limited`."""
    __tracebackhide__ = True
    _run(_not_limited(_Requests(client, target, request), times, status))


async def aassert_limited(
    client: Client,
    target: str,
    after: int,
    *,
    status: int = 429,
    clock: VirtualClock | None = None,
    **request: Any,
) -> Response:
    """As `assert_limited`, for a client whose methods are awaited: httpx.AsyncClient, Django's AsyncClient."""
    __tracebackhide__ = True
    return await _arun(_limited(_Requests(client, target, request), after, status, clock))


async def aassert_not_limited(
    client: Client, target: str, times: int = 100, *, status: int = 429, **request: Any
) -> None:
    """As `assert_not_limited`, for a client whose methods are awaited."""
    __tracebackhide__ = True
    await _arun(_not_limited(_Requests(client, target, request), times, status))


class _Answer:
    """A response, whichever client it is of."""

    def __init__(self, response: Response) -> None:
        self.response = response
        code = getattr(response, "status_code", None)
        if code is None:
            code = getattr(response, "status", None)
        try:
            self.status = int(str(code).partition(" ")[0])  # "429 TOO MANY REQUESTS", too
        except ValueError:
            told = type(response).__name__
            raise TypeError(f"expected a response with a status_code or a status, not {told}") from None

    def field(self, name: str) -> str | None:
        for key, value in dict(self.response.headers).items():
            if key.lower() == name.lower():
                return str(value)
        return None

    def __str__(self) -> str:
        fields = [f"{name}: {self.field(name) or 'absent'}" for name in _TOLD]
        return f"{self.status}\n    " + "\n    ".join(fields)


class _Requests:
    """Requests that are all alike, and what they were answered."""

    def __init__(self, client: Client, target: str, arguments: dict[str, Any]) -> None:
        method, _, path = target.rpartition(" ")
        if not isinstance(target, str) or not path or " " in method:
            raise ValueError('expected a method and a path, as in "POST /login"')
        self.target = target
        self._method = method or "GET"
        self._path = path
        self._client = client
        self._arguments = arguments
        self.answers: list[_Answer] = []

    def send(self) -> Any:
        """What the client answers, or an awaitable of it."""
        client, method, path, arguments = self._client, self._method, self._path, self._arguments
        if hasattr(client, "generic"):
            # Its methods encode `data`, each in its own way; `generic` sends it as it is.
            send = getattr(client, method.lower(), None)
            return send(path, **arguments) if send is not None else client.generic(method, path, **arguments)
        if hasattr(client, "open"):
            # Buffered, its body is closed: only then is a request over.
            return client.open(path, method=method, **{"buffered": True, **arguments})
        if not hasattr(client, "request"):
            raise TypeError(f"expected a test client, not {type(client).__name__}")
        try:
            known = inspect.signature(client.request).parameters
        except (TypeError, ValueError):
            known = {}  # type: ignore[assignment]
        for follow in ("follow_redirects", "allow_redirects"):
            if follow in known:
                arguments = {follow: False, **arguments}
        return client.request(method, path, **arguments)

    def passed(self, status: int) -> str:
        """How many passed, and how they were answered."""
        passed = [str(answer.status) for answer in self.answers if answer.status != status]
        if not passed:
            return "none passed before"
        told = ", ".join(passed[:_FEW]) + (", …" if len(passed) > _FEW else "")
        return f"{len(passed)} passed before, answered {told}"


_Sent: TypeAlias = Generator[_Requests, _Answer, Any]


def _limited(requests: _Requests, after: int, status: int, clock: VirtualClock | None) -> _Sent:
    __tracebackhide__ = True
    if isinstance(after, bool) or not isinstance(after, int) or after < 0:
        raise ValueError("after: expected an integer from 0")
    target = requests.target
    yield from _not_limited(requests, after, status)
    before = requests.passed(status)
    answer = yield requests
    if answer.status != status:
        raise AssertionError(
            f"{target}: request {after + 1} passed; expected it to be refused with {status}, after {after}.\n"
            f"  {before}; this one was answered {answer}"
        )
    told = answer.field("Retry-After")
    if told is None or not told.isascii() or not told.isdigit() or int(told) < 1:
        raise AssertionError(
            f"{target}: request {after + 1} was refused without saying when to return; "
            f"expected Retry-After with whole seconds from 1.\n  {before}; this one was answered {answer}"
        )
    if clock is not None:
        clock.advance(int(told))
        late = yield requests
        if late.status == status:
            raise AssertionError(
                f"{target}: still refused {told} seconds after request {after + 1}, as long as its Retry-After "
                f"said to wait.\n  {before}; then came {answer}\n  and after the wait {late}\n"
                "  (Does the application live by another clock than the one given?)"
            )
    return answer.response


def _not_limited(requests: _Requests, times: int, status: int) -> _Sent:
    __tracebackhide__ = True
    for number in range(1, times + 1):
        before = requests.passed(status)
        answer = yield requests
        if answer.status == status:
            raise AssertionError(
                f"{requests.target}: request {number} was refused; expected {times} to pass.\n"
                f"  {before}; this one was answered {answer}"
            )
    return None


def _run(steps: _Sent) -> Any:
    __tracebackhide__ = True
    try:
        requests = next(steps)
        while True:
            response = requests.send()
            if isawaitable(response):
                close = getattr(response, "close", None)
                if close is not None:
                    close()
                raise TypeError("this client is asynchronous: await aassert_limited or aassert_not_limited")
            requests = steps.send(_answer(requests, response))
    except StopIteration as stop:
        return stop.value


async def _arun(steps: _Sent) -> Any:
    __tracebackhide__ = True
    try:
        requests = next(steps)
        while True:
            response = requests.send()
            if isawaitable(response):
                response = await response
            requests = steps.send(_answer(requests, response))
    except StopIteration as stop:
        return stop.value


def _answer(requests: _Requests, response: Response) -> _Answer:
    answer = _Answer(response)
    requests.answers.append(answer)
    return answer
