"""Gatekeeper for FastAPI and Starlette."""
