-- The twin of Gcra. State: "g", the theoretical arrival time (TAT) in microseconds and the nanoseconds above them,
-- the time given back in the same two, and when it was written in microseconds.
--
-- Nanoseconds since 1970 do not fit into the 53 bits of a number here, nanoseconds from now do: all is reckoned
-- from now, in units of which `scale` make a microsecond. That is 1000, and 1 for buckets that take longer than 52
-- days to fill: of those the time between two tokens is rounded up to a whole microsecond.

STEP[3] = function(state, now, cost, burst, emission, scale)
    local full = burst * emission
    local owed, given, given_ns, behind = 0, 0, 0, 0
    if state then
        local tat, tat_ns, written
        tat, tat_ns, given, given_ns, written = unpack('<dHdHd', state, 2)
        if written > now then -- the clock stands behind the one that wrote this: time stands still until it is there
            behind = (written - now) * 1000
            now = written
        end
        owed = (tat - now) * scale + math.ceil(tat_ns * scale / 1000)
        if owed <= 0 then
            if owed + given * scale + given_ns <= 0 then -- the last of what was ever charged has flowed off
                given, given_ns = 0, 0
            end
            owed = 0
        end
    end
    local ns, wait = 1000 / scale, -1
    if cost <= burst then
        local after = owed + cost * emission
        local room = full - after
        if room >= 0 then
            local left = floor(room / emission)
            if left == burst then
                return state, left, 0, 0, false
            end
            local reset = ((left + 1) * emission - room) * ns + behind
            if cost == 0 then
                return state, left, reset, 0, false
            end
            local mark = pack('<dHdH', now + floor(after / scale), after % scale * ns, given, given_ns)
            return 'g' .. mark .. pack('<d', now), left, reset, 0, mark
        end
        wait = behind - room * ns
    end
    local left = floor((owed < full and full - owed or 0) / emission)
    -- Above the whole burst (it was lowered since) more than one token may be missing before one is there.
    local reset = owed > 0 and (owed - (burst - left - 1) * emission) * ns + behind or 0
    return state, left, reset, wait, false
end

if gives > 0 then
    GIVE[3] = function(state, now, cost, receipt, burst, emission, scale)
        local tat, tat_ns, given, given_ns, written = unpack('<dHdHd', state, 2)
        local its, its_ns, then_given, then_given_ns = unpack('<dHdH', receipt)
        if given > 2 ^ 51 then -- some 70 years of time given back to a key that was never at rest: no more is
            return state
        end
        if written > now then
            now = written
        end
        -- Hits flow off in the order they came, each when the TAT it left has passed, and the nearer that lies the
        -- more was given back since. To give more than is left would give twice what has flowed off already.
        local since = (given - then_given) * scale + math.ceil((given_ns - then_given_ns) * scale / 1000)
        local left = (its - now) * scale + floor(its_ns * scale / 1000) - (since > 0 and since or 0)
        local back = cost * emission
        if back > left then
            back = left
        end
        if back < 0 then
            back = 0
        end
        local owed = (tat - now) * scale + math.ceil(tat_ns * scale / 1000) - back
        local ns = 1000 / scale
        given_ns = given_ns + back % scale * ns
        given = given + floor(back / scale) + floor(given_ns / 1000)
        given_ns = given_ns % 1000
        -- Remembered until the last hit would have flowed off, for receipts tell where that was.
        if owed + given * scale + given_ns <= 0 then
            return false
        end
        return 'g' .. pack('<dHdHd', now + floor(owed / scale), owed % scale * ns, given, given_ns, now)
    end
end
