"""The routes of a URLconf: their templates, and the limits of their views."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple

from django.conf import settings
from django.contrib.admindocs import utils
from django.core.signals import setting_changed
from django.urls import LocalePrefixPattern, URLPattern, URLResolver, get_resolver
from django.utils import translation

LANGUAGE: Final = "<language>/"
"""What stands for the prefix of a language in a template."""


class Route(NamedTuple):
    """A view at its place."""

    template: str
    """As Django writes it, the prefixes of each `include()` before it: `shop/item/<int:pk>/`."""

    name: str
    """With its namespaces, as `reverse` takes it; empty if it has none."""

    view: Any


def routes(urlconf: Any = None) -> Iterator[Route]:
    """Every view of a URLconf, by default of the root."""
    yield from _walk(get_resolver(urlconf).url_patterns, "", "", is_told=True)


def template(match: Any, urlconf: Any = None) -> str:
    """The template of the route that a request was resolved to.

    It is the same in each language: else every language of a site would be a quota of its own.
    """
    urlconf = urlconf or getattr(settings, "ROOT_URLCONF", None)
    known: dict[str, str] = {} if urlconf is None else _in_languages(urlconf)
    return known.get(match.route, match.route)  # type: ignore[no-any-return]


def _walk(patterns: Sequence[Any], before: str, space: str, *, is_told: bool) -> Iterator[Route]:
    for one in patterns:
        if isinstance(one, URLResolver):
            is_language = is_told and isinstance(one.pattern, LocalePrefixPattern)
            piece = LANGUAGE if is_language else str(one.pattern)
            within = f"{space}{one.namespace}:" if one.namespace else space
            yield from _walk(one.url_patterns, _joined(before, piece), within, is_told=is_told)
        elif isinstance(one, URLPattern):
            name = f"{space}{one.name}" if one.name else ""
            yield Route(_joined(before, str(one.pattern)), name, one.callback)


def _joined(before: str, after: str) -> str:
    """As Django joins them when it resolves."""
    return before + after.removeprefix("^") if before else after


@lru_cache(maxsize=64)
def _in_languages(urlconf: Any) -> dict[str, str]:
    """The template by the route as it is written in a language, where routes differ by language."""
    resolver = get_resolver(urlconf)
    if not settings.USE_I18N or not _varies(resolver.url_patterns):
        return {}
    with translation.override(settings.LANGUAGE_CODE):
        told = [route.template for route in _walk(resolver.url_patterns, "", "", is_told=True)]
    found: dict[str, str] = {}
    for language, _ in settings.LANGUAGES:
        with translation.override(language):
            written = [route.template for route in _walk(resolver.url_patterns, "", "", is_told=False)]
        for text, one in zip(written, told, strict=True):
            found.setdefault(text, one)
    return found


def _varies(patterns: Sequence[Any]) -> bool:
    for one in patterns:
        pattern = one.pattern
        written = getattr(pattern, "_route", getattr(pattern, "_regex", ""))
        if isinstance(pattern, LocalePrefixPattern) or not isinstance(written, str):
            return True
        if isinstance(one, URLResolver) and _varies(one.url_patterns):
            return True
    return False


_SETTINGS: Final = ("ROOT_URLCONF", "LANGUAGES", "LANGUAGE_CODE", "USE_I18N")


def _forget(*, setting: str, **_: Any) -> None:
    if setting in _SETTINGS:
        _in_languages.cache_clear()


setting_changed.connect(_forget, dispatch_uid="gatekeeper_django.routes")

_METHODS: Final = ("get", "post", "put", "patch", "delete", "head", "options", "trace")


def class_of(view: Any) -> Any:
    """The class of a class-based view, in Django or in its REST framework; else None."""
    return getattr(view, "view_class", None) or getattr(view, "cls", None)


def methods_of(view: Any) -> frozenset[str] | None:
    """The methods that a view answers, in upper case; None where it does not say."""
    actions = getattr(view, "actions", None)  # of a viewset
    if actions:
        return frozenset(method.upper() for method in actions)
    cls = class_of(view)
    found = [] if cls is None else [method.upper() for method in _METHODS if hasattr(cls, method)]
    return frozenset(found) or None


_PARAMETER: Final = re.compile(r"<(?:(?P<kind>[^>:]+):)?(?P<name>[^>]+)>")


def as_pattern(text: str) -> str:
    """A template as rules write paths: `/shop/item/{pk}/`."""
    if "(" in text or text.endswith(("$", r"\Z")):  # a regular expression, at least in part
        for simplify in (
            utils.remove_non_capturing_groups,
            utils.replace_named_groups,
            utils.replace_unnamed_groups,
            utils.replace_metacharacters,
        ):
            text = simplify(text)

    def braces(found: re.Match[str]) -> str:
        return f"{{{found['name']}:path}}" if found["kind"] == "path" else f"{{{found['name']}}}"

    return "/" + _PARAMETER.sub(braces, text).lstrip("/")
