"""The gateway's data plane: bytes between clients and upstreams."""
