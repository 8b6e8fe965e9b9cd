"""Gatekeeper for Flask: `gatekeeper_flask.Gatekeeper`, an extension with `init_app`."""

from gatekeeper.errors import MissingExtra

try:
    import flask as _flask  # noqa: F401
except ImportError:
    raise MissingExtra("Gatekeeper for Flask", "flask") from None

from gatekeeper_flask.errors import Refused, TooManyRequests
from gatekeeper_flask.extension import Gatekeeper
from gatekeeper_flask.sessions import SessionInterface

__all__ = ["Gatekeeper", "Refused", "SessionInterface", "TooManyRequests"]
