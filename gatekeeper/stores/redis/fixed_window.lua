-- The twin of FixedWindow. State: "f", its start in microseconds, the hits in it.

STEP[5] = function(state, now, cost, limit, width)
    local start, count = now, 0
    if state then
        start, count = unpack('<dd', state, 2)
        if start + width <= now then
            start, count = now, 0
        end
    end
    local left = limit - count - cost
    local reset = (start + width - now) * 1000
    if left >= 0 then
        if cost == 0 then
            return state, left, count == 0 and 0 or reset, 0, false
        end
        return 'f' .. pack('<dd', start, count + cost), left, reset, 0, start
    end
    return state, count < limit and limit - count or 0, count == 0 and 0 or reset, cost <= limit and reset or -1, false
end

if gives > 0 then
    GIVE[5] = function(state, now, cost, receipt)
        local start, count = unpack('<dd', state, 2)
        if tonumber(receipt) ~= start then
            return state
        end
        return count > cost and 'f' .. pack('<dd', start, count - cost)
    end
end
