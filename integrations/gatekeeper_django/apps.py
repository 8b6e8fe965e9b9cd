"""The application, for INSTALLED_APPS: it brings the system checks and the management command."""

from __future__ import annotations

from django.apps import AppConfig


class GatekeeperConfig(AppConfig):  # type: ignore[misc]  # Django has no hints of its own
    name = "gatekeeper_django"
    label = "gatekeeper"
    verbose_name = "Gatekeeper"

    def ready(self) -> None:
        from gatekeeper_django.checks import register

        register()
