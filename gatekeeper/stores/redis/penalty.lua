-- The twin of Penalty. State: "p", the number of bans, the end of the last one, the beginning of the time in which
-- strikes are counted (microseconds), their number.

STEP[6] = function(state, now, cost, limit, within, first, most)
    local bans, until_, since, strikes = 0, 0, 0, 0
    if state then
        bans, until_, since, strikes = unpack('<Bddd', state, 2)
        if now >= since + within then
            since, strikes = 0, 0
        end
        if now >= until_ + most then
            bans, until_ = 0, 0
        end
    end
    if now < until_ then
        local wait = (until_ - now) * 1000
        return state, 0, wait, wait, false
    end
    if cost > 0 then
        if strikes == 0 then
            since = now
        end
        strikes = strikes + 1
        if strikes >= limit then
            bans = bans < 255 and bans + 1 or 255
            local ban = first * 2 ^ (bans < 63 and bans - 1 or 62)
            until_ = now + (ban < most and ban or most)
            since, strikes = 0, 0
        end
        state = 'p' .. pack('<Bddd', bans, until_, since, strikes)
    end
    return state, limit - strikes, strikes > 0 and (since + within - now) * 1000 or 0, 0, false
end

if gives > 0 then
    GIVE[6] = function(state)
        return state -- a strike is a strike: it has no receipt
    end
end
