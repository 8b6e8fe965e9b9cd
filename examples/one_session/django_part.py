"""Where users log in, and out: `gunicorn -b 127.0.0.1:9101 django_part:application`."""

import os
import secrets
from pathlib import Path

import django
from django.conf import settings
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import path

settings.configure(
    SECRET_KEY=secrets.token_urlsafe(50),  # signs nothing here that outlives the process
    ALLOWED_HOSTS=["*"],
    ROOT_URLCONF=__name__,
    INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes", "gatekeeper_django"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": os.environ["USERS"]}},
    MIDDLEWARE=[
        "gatekeeper_django.GatekeeperMiddleware",
        "gatekeeper_django.SessionMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
    ],
    SESSION_ENGINE="gatekeeper_django.sessions",
    SESSION_COOKIE_NAME="session",
    GATEKEEPER=os.environ.get("POLICY", str(Path(__file__).with_name("policy.toml"))),
)
django.setup()

from django.contrib.auth import authenticate, login, logout  # noqa: E402
from django.contrib.auth.models import User  # noqa: E402
from django.core.management import call_command  # noqa: E402
from django.core.wsgi import get_wsgi_application  # noqa: E402


def log_in(request: HttpRequest) -> HttpResponse:
    user = authenticate(request, username=request.POST["name"], password=request.POST["password"])
    if user is None:
        return HttpResponse(status=401)
    login(request, user)
    return HttpResponse(status=204)


def log_out(request: HttpRequest) -> HttpResponse:
    logout(request)
    return HttpResponse(status=204)


def me(request: HttpRequest) -> HttpResponse:
    return JsonResponse({"name": request.user.username, "cart": request.session.get("cart", [])})


urlpatterns = [path("django/login", log_in), path("django/logout", log_out), path("django/me", me)]
application = get_wsgi_application()
call_command("migrate", verbosity=0)
if not User.objects.exists():
    User.objects.create_user("ada", password="correct horse")  # noqa: S106  # of an example
