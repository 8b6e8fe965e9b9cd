-- The twin of Concurrency: a sliding window, but for the waits that it tells.

-- When somebody else will be done cannot be known: a second is said.
STEP[2] = function(state, now, cost, limit, period)
    local after, left, _, wait, receipt = STEP[1](state, now, cost, limit, period)
    return after, left, left < limit and 1e9 or 0, wait > 0 and 1e9 or wait, receipt
end

GIVE[2] = GIVE[1]
