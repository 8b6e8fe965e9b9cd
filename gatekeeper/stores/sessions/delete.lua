-- Ends a session, and answers what it was; nil if it was not there. KEYS: the session. ARGV: its key; what the names of
-- all lists of owners begin with, empty where they are not to be reached from here.

local there = redis.call('GET', KEYS[1])
if there then
    redis.call('DEL', KEYS[1])
    if ARGV[2] ~= '' then
        redis.call('ZREM', ARGV[2] .. string.sub(there, 17, 80) .. '}', ARGV[1])
    end
end
return there
