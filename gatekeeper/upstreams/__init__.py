"""Which service answers: pools of upstreams, policies that order them, the ring, passive health."""
