"""Sessions: what is remembered of a client between its requests, so that any server can serve any of them."""
