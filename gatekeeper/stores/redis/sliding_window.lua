-- The twin of SlidingWindow.
--
-- State: "w", the tick of the last write (6 bytes), the sum of all counts (5 bytes), then the log, newest first and
-- at most 65 entries long: the low byte of a tick, the hits that fell into it (5 bytes). Ages are at most 64 when
-- written, so a byte tells them for 191 ticks more; a state that is older than 64 ticks counts for nothing anyway.

-- The age of the entry with which, the oldest first, `need` units have left the window.
local function age_freed(log, tick, need)
    local at = #log - 5
    while true do
        local low, count = unpack('<BI5', log, at)
        need = need - count
        if need <= 0 then
            return (tick - low) % 256
        end
        at = at - 6
    end
end

STEP[1] = function(state, now, cost, limit, period)
    local width = period / 64
    local tick = floor(now / width)
    local sum, oldest, log = 0, 0, ''
    if state then
        local written, held = unpack('<I6I5', state, 2)
        if written > tick then -- the clock stands behind the one that wrote this: time stands still until it is there
            tick = written
        end
        if tick - written <= 64 then
            local last = #state
            while last > 12 do
                local low, count = unpack('<BI5', state, last - 5)
                oldest = (tick - low) % 256
                if oldest <= 64 then
                    break
                end
                held = held - count
                last = last - 6
            end
            if last > 12 then
                sum, log = held, sub(state, 13, last)
            end
        end
    end
    local expires = (tick + 65) * width
    -- Above the limit (it was lowered since) nothing is free until the excess has left, too.
    local left = (sum < limit and limit - sum or 0) - cost
    if left >= 0 then
        if sum > limit then
            oldest = age_freed(log, tick, sum - limit + 1)
        end
        if cost == 0 then
            return state, left, sum == 0 and 0 or (expires - oldest * width - now) * 1000, 0, false
        end
        local low, here = tick % 256, 0
        if sum == 0 then
            oldest = 0
        elseif byte(log) == low then
            here = unpack('<I5', log, 2)
            log = sub(log, 7)
        end
        return pack('<c1I6I5BI5', 'w', tick, sum + cost, low, here + cost) .. log,
            left, (expires - oldest * width - now) * 1000, 0, tick
    end
    if sum == 0 then
        return state, limit, 0, -1, false
    end
    if sum > limit then
        oldest = age_freed(log, tick, sum - limit + 1)
    end
    local wait = -1
    if cost <= limit then
        wait = (expires - age_freed(log, tick, sum + cost - limit) * width - now) * 1000
    end
    return state, sum < limit and limit - sum or 0, (expires - oldest * width - now) * 1000, wait, false
end

if gives > 0 then
    GIVE[1] = function(state, now, cost, receipt)
        receipt = tonumber(receipt)
        local written, sum = unpack('<I6I5', state, 2)
        if written < receipt or written - receipt > 64 then
            return state
        end
        for at = 13, #state, 6 do
            local low, count = unpack('<BI5', state, at)
            if low == receipt % 256 then
                local rest = sub(state, at + 6)
                if count > cost then
                    rest = pack('<BI5', low, count - cost) .. rest
                else
                    cost = count
                end
                if sum == cost then
                    return false
                end
                return pack('<c1I6I5', 'w', written, sum - cost) .. sub(state, 13, at - 1) .. rest
            end
        end
        return state
    end
end
