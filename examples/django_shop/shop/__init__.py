"""A shop whose views cost something."""
