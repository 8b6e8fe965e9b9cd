-- The twin of SlidingCounter. State: "c", the window, the hits in it, the hits in the one before.

-- floor(a * c / m) and what is left over, for a <= m < 2^51. The product may not fit into 53 bits: then it is a
-- long multiplication, as many bits of c at a time as fit.
local function muldiv(a, c, m)
    local product = a * c
    if product < 2 ^ 53 then
        local rest = product % m
        return (product - rest) / m, rest
    end
    local _, bits = math.frexp(m)
    local base = 2 ^ (52 - bits)
    local place = 1
    while place * base <= c do
        place = place * base
    end
    local whole, rest = 0, 0
    while place >= 1 do
        local value = rest * base + floor(c / place) % base * a
        rest = value % m
        whole = whole * base + (value - rest) / m
        place = place / base
    end
    return whole, rest
end

local function weight_of(before, left, width)
    local whole, rest = muldiv(left, before, width)
    return rest > 0 and whole + 1 or whole
end

-- The nanoseconds until the estimate is at most `target`, if nothing else comes.
local function falls(passed, here, before, weight, target, width)
    if target < 0 or here + weight <= target then
        return 0
    end
    local whole, rest, divisor
    if here <= target then
        divisor = before
        whole, rest = muldiv(target - here, width, before)
    else
        divisor = here
        whole, rest = muldiv(target, width, here)
        whole = whole - width
    end
    return (width - whole - passed) * 1000 - floor(rest * 1000 / divisor)
end

STEP[4] = function(state, now, cost, limit, width)
    local window = floor(now / width)
    local passed, here, before = now - window * width, 0, 0
    if state then
        local written, hits, earlier = unpack('<ddd', state, 2)
        if window == written then
            here, before = hits, earlier
        elseif window < written then -- the clock stands behind: stand at the start of that window
            window, passed, here, before = written, 0, hits, earlier
        elseif window == written + 1 then
            before = hits
        end
    end
    local weight = weight_of(before, width - passed, width)
    local left = limit - here - weight
    if cost <= left then
        local after = here + cost
        local reset = falls(passed, after, before, weight, after + weight - 1, width)
        if cost == 0 then
            return state, left, reset, 0, false
        end
        return 'c' .. pack('<ddd', window, after, before), left - cost, reset, 0, window
    end
    local reset = falls(passed, here, before, weight, here + weight - 1, width)
    local wait = cost <= limit and falls(passed, here, before, weight, limit - cost, width) or -1
    return state, left > 0 and left or 0, reset, wait, false
end

if gives > 0 then
    GIVE[4] = function(state, now, cost, receipt)
        local window, here, before = unpack('<ddd', state, 2)
        receipt = tonumber(receipt)
        if receipt == window then
            here = here > cost and here - cost or 0
        elseif receipt == window - 1 then
            before = before > cost and before - cost or 0
        end
        if here == 0 and before == 0 then
            return false
        end
        return 'c' .. pack('<ddd', window, here, before)
    end
end
