"""`gatekeeper serve`: a parent that holds the socket, and a worker that serves from it."""
