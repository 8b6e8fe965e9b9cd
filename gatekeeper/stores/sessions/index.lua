-- The list of an owner's sessions: a sorted set of their keys, by when they expire, in milliseconds. It expires with
-- the last of them. This is put before the scripts that need it.

local call = redis.call

if not redis.REDIS_VERSION_NUM then -- before Redis 7 a script that asked for the time could not write without
    redis.replicate_commands()
end
local time = call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function list(index, key, ttl)
    -- This first: what takes memory is refused by a full server only as long as the script has written nothing.
    call('ZADD', index, string.format('%.0f', now + ttl), key)
    call('ZREMRANGEBYSCORE', index, '-inf', now)
    if call('PTTL', index) < tonumber(ttl) then
        call('PEXPIRE', index, ttl)
    end
end
