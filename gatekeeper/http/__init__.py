"""The words of HTTP: a neutral request, fields, route patterns."""
