"""Gatekeeper for Django."""
