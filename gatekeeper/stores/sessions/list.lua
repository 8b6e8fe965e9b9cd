-- Puts a session on the list of its owner, on a cluster. KEYS: the list. ARGV: the session's key, its time to live in
-- milliseconds.

list(KEYS[1], ARGV[1], ARGV[2])
return 1
