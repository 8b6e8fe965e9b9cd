"""The views of the shop."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from django.contrib.auth import authenticate, login
from django.http import HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse

from gatekeeper_django import Limited, limit


def index(request: HttpRequest) -> HttpResponse:
    ticket: Any = request.gatekeeper
    return JsonResponse({"you": ticket.address, "left": ticket.tightest.verdict.remaining})


@limit("3/minute")
def item(request: HttpRequest, pk: int) -> HttpResponse:
    """All items share the quota of a client: it belongs to the route, and not to the path."""
    return JsonResponse({"item": pk})


def log_in(request: HttpRequest) -> HttpResponse:
    fields = request.POST
    user = authenticate(request, username=fields.get("username"), password=fields.get("password"))
    if user is None:
        return HttpResponse("Wrong.\n", status=401)
    login(request, user)
    return HttpResponse("Welcome.\n")


@limit("2/minute")
def report(request: HttpRequest) -> HttpResponse:
    return HttpResponse("A report that costs much to make.\n")


@limit(concurrency=1)
async def export(request: HttpRequest) -> StreamingHttpResponse:
    """A client has one in progress, until its last byte."""

    async def lines() -> AsyncIterator[str]:
        for number in range(int(request.GET.get("lines", "3"))):
            yield f"order {number}\n"
            await asyncio.sleep(float(request.GET.get("pause", "0")))

    return StreamingHttpResponse(lines(), content_type="text/plain")


async def orders(request: HttpRequest) -> HttpResponse:
    user = await request.auser()
    return JsonResponse({"user": user.get_username(), "orders": []})


def slow_down(request: HttpRequest, exception: Limited) -> HttpResponse:
    """The page of a refusal, as `handler404` is for what is not there; the fields are added to it."""
    wait = -int(-exception.verdict.retry_after // 1)  # rounded up
    return HttpResponse(f"Not so fast: again in {wait} seconds.\n", status=429, content_type="text/plain")
