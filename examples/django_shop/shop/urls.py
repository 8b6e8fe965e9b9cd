"""The routes of the shop."""

from django.urls import include, path

from gatekeeper_django import limit

from . import views

account = [path("orders", views.orders, name="orders")]

urlpatterns = [
    path("", views.index),
    path("item/<int:pk>", views.item),
    path("login", views.log_in),
    path("report", views.report),
    path("export", views.export),
    # A limit for all that is included, under one name: they share it.
    path("account/", limit("30/hour", name="orders", key="user")(include((account, "account")))),
]

handler429 = "shop.views.slow_down"
