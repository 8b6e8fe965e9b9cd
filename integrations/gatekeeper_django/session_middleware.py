"""Django's SessionMiddleware for our sessions: awaited under ASGI, and with tokens of several cookies."""

from __future__ import annotations

import time
from typing import Any

from django.conf import settings as django_settings
from django.contrib.sessions.backends.base import UpdateError
from django.contrib.sessions.exceptions import SessionInterrupted
from django.contrib.sessions.middleware import SessionMiddleware as DjangoSessionMiddleware
from django.utils.cache import patch_vary_headers
from django.utils.http import http_date

from gatekeeper.sessions.cookies import Cookie, dropped, joined, written
from gatekeeper_django.conf import policy
from gatekeeper_django.sessions import SessionStore


class SessionMiddleware(DjangoSessionMiddleware):  # type: ignore[misc]  # Django has no hints of its own
    """Stands in place of `django.contrib.sessions.middleware.SessionMiddleware`, and goes by the same settings.

    Beyond that one it saves sessions without a thread under ASGI, and loads them before the view with
    `session.load = "early"`; reads and writes tokens that take several cookies; does not load a session again that
    a rule has loaded; and gives no client a key back that was replaced while `session.grace` lasts.
    It wants `SESSION_ENGINE = "gatekeeper_django.sessions"`, or a subclass of its SessionStore.
    """

    def process_request(self, request: Any) -> None:
        session = self.SessionStore(next(joined(_cookie(), _came(request)), None))
        session.takes_parts = True
        ticket = getattr(request, "gatekeeper", None)
        if ticket is not None and ticket.session is not None and ticket.gate is policy().keeper.gate:
            session.adopt(ticket.session)
        request.session = session

    def process_response(self, request: Any, response: Any) -> Any:
        session = getattr(request, "session", None)
        if not isinstance(session, SessionStore):
            return response
        if is_saved := _wants_to_be_saved(session, response):
            try:
                session.save()
            except UpdateError:
                raise _interrupted() from None
        return _told(request, session, response, is_saved)

    async def __acall__(self, request: Any) -> Any:
        self.process_request(request)
        await request.session.preload()
        response = await self.get_response(request)
        session = getattr(request, "session", None)
        if not isinstance(session, SessionStore):
            return response
        if is_saved := _wants_to_be_saved(session, response):
            try:
                await session.asave()
            except UpdateError:
                raise _interrupted() from None
        return _told(request, session, response, is_saved)


def _cookie() -> Cookie:
    """How it is written, where that is not Django's to say."""
    return Cookie(django_settings.SESSION_COOKIE_NAME)


def _came(request: Any) -> list[str]:
    came = request.META.get("HTTP_COOKIE")
    return [came] if isinstance(came, str) else []


def _wants_to_be_saved(session: SessionStore, response: Any) -> bool:
    """What failed on the server saves nothing, as Django has it."""
    wanted = session.modified or django_settings.SESSION_SAVE_EVERY_REQUEST
    return bool(wanted) and not session.is_empty() and response.status_code < 500


def _interrupted() -> SessionInterrupted:
    return SessionInterrupted("The request's session was ended before the request was answered, as by a logout.")


def _told(request: Any, session: SessionStore, response: Any, is_saved: bool) -> Any:
    """The response, with what is to be told of the session."""
    cookie, came = _cookie(), _came(request)
    fields = []
    if session.is_empty():
        if next(joined(cookie, came), None) is not None or cookie.name in request.COOKIES:
            fields = dropped(cookie, came)
    elif is_saved and session.session_key is not None and not session.is_moved:
        fields = written(cookie, session.session_key, 1, came)
    age = None if not is_saved or session.get_expire_at_browser_close() else session.get_expiry_age()
    for _, field in fields:
        name, _, value = field.partition(b";")[0].decode("ascii").partition("=")
        if value:
            response.set_cookie(
                name,
                value,
                max_age=age,
                expires=None if age is None else http_date(time.time() + age),
                domain=django_settings.SESSION_COOKIE_DOMAIN,
                path=django_settings.SESSION_COOKIE_PATH,
                secure=django_settings.SESSION_COOKIE_SECURE or None,
                httponly=django_settings.SESSION_COOKIE_HTTPONLY or None,
                samesite=django_settings.SESSION_COOKIE_SAMESITE,
            )
        else:
            response.delete_cookie(
                name,
                path=django_settings.SESSION_COOKIE_PATH,
                domain=django_settings.SESSION_COOKIE_DOMAIN,
                samesite=django_settings.SESSION_COOKIE_SAMESITE,
            )
    if session.accessed or fields:
        patch_vary_headers(response, ("Cookie",))
    return response
