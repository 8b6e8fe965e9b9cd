-- The sessions of an owner: pairs of a key and the session. What is on the list and is theirs no more is taken off it.
-- Where sessions are not to be reached from here the answer are the keys on the list. KEYS: the list. ARGV: the owner's
-- digest; what the names of all sessions begin with, empty where they are not to be reached from here.

call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
local keys = call('ZRANGE', KEYS[1], 0, -1)
if ARGV[2] == '' then
    return keys
end
local found = {}
for _, key in ipairs(keys) do
    local there = call('GET', ARGV[2] .. key .. '}')
    if there and string.sub(there, 17, 80) == ARGV[1] then
        found[#found + 1] = { key, there }
    else
        call('ZREM', KEYS[1], key)
    end
end
return found
