-- The counters of Gatekeeper, kept by the server itself: the twins of gatekeeper/ratelimit/algorithms.py. This is put
-- before the kinds that a batch needs, batch.lua after them: a script of all would make functions for nothing.
--
-- Each kind has two: STEP(state, now, cost, its numbers) gives the state to keep, what remains, when that grows, when
-- the hit would be admitted (0: it is, -1: never), and the receipt; GIVE(state, now, cost, receipt, its numbers) the
-- state to keep. `now` and periods are in microseconds, waits in nanoseconds. States are strings, false for none.
--
-- KEYS: the counters of the gives, the resets, the takes and the hits, in that order. ARGV: for each of them its kind,
-- whether it is a shadow, the cost, the lifetime in milliseconds and the numbers of the algorithm; then, unless there
-- are but hits to be spent at the server's own time, the time in microseconds or -1, whether to spend, how many
-- gives, resets and takes there are; and a receipt for each give.

local pack, unpack, sub, byte = struct.pack, struct.unpack, string.sub, string.byte
local floor, call = math.floor, redis.call
local STEP, GIVE = {}, {}

local count = #KEYS
local now, spend, gives, resets, takes = -1, 1, 0, 0, 0
if #ARGV > count then
    now, spend, gives, resets, takes = unpack('<dBI4I4I4', ARGV[count + 1])
end
if now < 0 then
    if not redis.REDIS_VERSION_NUM then -- before Redis 7 a script that asked for the time could not write without
        redis.replicate_commands()
    end
    local time = call('TIME')
    now = time[1] * 1000000 + time[2]
end
