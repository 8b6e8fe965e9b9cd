"""The settings of the shop. `GATEKEEPER` is what this example is about."""

import os
from pathlib import Path

BASE = Path(__file__).resolve().parent.parent

SECRET_KEY = os.environ.get("SHOP_SECRET", "an example has no secrets; a real shop reads its own")
ALLOWED_HOSTS = ["localhost", "127.0.0.1"]
ROOT_URLCONF = "shop.urls"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ.get("SHOP_DATABASE", str(BASE / "db.sqlite3")),
    }
}

INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "gatekeeper_django",  # the checks, and the command `manage.py gatekeeper`
]

MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    # Before all that costs. What counts by the user waits for those behind it.
    "gatekeeper_django.GatekeeperMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
]

GATEKEEPER = {
    "store": {"url": os.environ.get("SHOP_STORE", "memory://")},
    "limits": [
        {"name": "pages", "rate": "60/minute"},
        # Only logins that fail are charged: by who tries, and by whom they try to be.
        {"name": "login", "rate": "5/minute", "match": "POST /login", "give_back": "2xx", "on_error": "deny"},
        {
            "name": "login-name",
            "rate": "20/hour",
            "match": "POST /login",
            "key": "form:username",
            "give_back": "2xx",
            "on_error": "deny",
        },
        {"name": "account", "rate": "10/minute", "match": "/account/*", "key": "user"},
    ],
}
