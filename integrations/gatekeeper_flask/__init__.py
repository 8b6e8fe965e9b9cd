"""Gatekeeper for Flask."""
