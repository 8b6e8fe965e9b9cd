"""A request of Django's as the core sees it, and who its user is."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import Any, Final

from django.core.exceptions import RequestDataTooBig
from django.http import UnreadablePostError
from django.utils.functional import SimpleLazyObject

from gatekeeper.commands import Body, Call, Steps
from gatekeeper.errors import Limited, StoreError
from gatekeeper.gate import Gate
from gatekeeper.http.bodies import is_longer
from gatekeeper.ticket import Ticket


class DjangoRequest:
    """A Request over Django's HttpRequest, which is its `native`.

    Its path is the one that Django's URLconf sees, with the script's prefix before it.
    """

    def __init__(self, request: Any) -> None:
        self.native = request
        self.method: str = request.method or "GET"  # an HttpRequest made by hand has none
        # Under ASGI Django takes the prefix off a path that has it, and routes one without it all the same: both
        # are one. (Under WSGI its `path` is so already.)
        prefix = getattr(request, "script_name", "")
        self.path: str = prefix.rstrip("/") + request.path_info if prefix else request.path
        self.peer: str | None = request.META.get("REMOTE_ADDR")

    def fields(self, name: str) -> list[str]:
        scope = getattr(self.native, "scope", None)
        if scope is None:
            value = self.field(name)
            return [] if value is None else [value]
        wanted = name.encode("latin-1")
        return [value.decode("latin-1") for key, value in scope.get("headers", ()) if key.lower() == wanted]

    def field(self, name: str) -> str | None:
        key = name.upper().replace("-", "_")
        if key not in ("CONTENT_TYPE", "CONTENT_LENGTH"):
            key = "HTTP_" + key
        value = self.native.META.get(key)
        return value if isinstance(value, str) else None

    def query(self) -> str:
        query: str = self.native.META.get("QUERY_STRING", "")
        return query


class DjangoTicket(DjangoRequest, Ticket):
    """The ticket of a request, in `request.gatekeeper`."""

    gate: Gate  # no other makes one of these

    awaiting = False
    """Whether who asks of it can await."""

    @property
    def blocking(self) -> bool:  # type: ignore[override]
        return not self.awaiting

    steps: Steps[int] | None = None
    """An admission that waits until the user is known, and the question it has asked."""

    question: Call | None = None

    raised: Limited | StoreError | None = None
    """A refusal, or a session that failed, that another middleware let pass through it as an error."""

    bans: tuple[tuple[str, str], ...] = ()
    """The rules and keys that its refusal has banned."""

    seen: Any = None
    """The user that was last read."""

    def read(self, most: int) -> Body:
        """The body, None if it is longer; the view is given it all the same.

        Of a `multipart/form-data` form nothing else is left once it was parsed, as CSRF protection does before a
        view.
        """
        request = self.native
        if request.content_type == "multipart/form-data" and _is_parsed(request):
            return dict(request.POST.lists())
        if is_longer(request.META.get("CONTENT_LENGTH") or "", most):
            return None
        stream: Any = getattr(request, "_stream", None)
        if not hasattr(request, "_body") and stream is not None and stream.seekable():
            # Django has the whole body of an ASGI request in a file. However long it is, we do not want it all;
            # and whatever its Content-Length says, beside a Transfer-Encoding.
            head = stream.read(most + 1)
            stream.seek(0)
            if len(head) > most:
                return None
        try:
            body: bytes = request.body
        except (RequestDataTooBig, UnreadablePostError):
            return None  # or the client has left within it, and gets no answer: that is no fault to be reported
        return body if len(body) <= most else None

    async def aread(self, most: int) -> Body:
        return self.read(most)  # Django has read it by now: nothing waits

    def let_go(self) -> None:
        """The request is over. (It and its ticket held each other: the cycle would wait for the collector.)"""
        self.native = None
        self.seen = None


def _is_parsed(request: Any) -> bool:
    """Whether Django has made a form of the body, and kept nothing of it."""
    return request._read_started and hasattr(request, "_post") and not hasattr(request, "_body")


def request_of(arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
    """The HttpRequest among the arguments of a view or of a view's method. Raises TypeError if there is none."""
    for one in (*arguments[:2], keywords.get("request")):
        if hasattr(one, "META"):
            # Django REST framework hands views a request of its own around Django's.
            return getattr(one, "_request", one)
    raise TypeError("limit: expected a view, which is called with a request")


def user_of(ticket: Any) -> Mapping[str, Any] | Awaitable[Mapping[str, Any] | None] | None:
    """The user that Django has authenticated, as a key's part "user" counts by it: the primary key, as text.

    This is `identity.user` where the settings name none. The claims besides are `username`, `is_staff` and
    `is_superuser`. None for the anonymous, and where no middleware authenticates.
    """
    request = ticket.native
    user = getattr(request, "user", None)
    if user is None:
        return None
    if getattr(ticket, "awaiting", False) and isinstance(user, SimpleLazyObject) and hasattr(request, "auser"):
        return _awaited(ticket, request)
    ticket.seen = user
    return _claims(user)


async def _awaited(ticket: Any, request: Any) -> Mapping[str, Any] | None:
    ticket.seen = request.user
    return _claims(await request.auser())


_TOLD: Final = ("is_staff", "is_superuser")


def _claims(user: Any) -> Mapping[str, Any] | None:
    if not user.is_authenticated:
        return None
    name = user.get_username() if hasattr(user, "get_username") else str(user)
    return {"sub": str(user.pk), "username": name, **{claim: bool(getattr(user, claim, False)) for claim in _TOLD}}
