"""Where sessions live: each store answers the same commands, and passes the same contract test."""
