"""Where counters live: each store answers the same batches, and passes the same contract test.

Where sessions live is in `sessions`.
"""
