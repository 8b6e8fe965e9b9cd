-- One batch in one atomic step: gives, resets, takes, then the hits, all of which are spent or none. The answer has
-- for each hit what remains, when that grows, when the same hit would be admitted, and the receipt.

local LETTERS = 'wwgcfp' -- by kind: what its states begin with

local function state_of(key, kind)
    local state = call('GET', key)
    if state and byte(state) ~= byte(LETTERS, kind) then
        error('FOREIGN', 0)
    end
    return state
end

if count == 1 and #ARGV == 1 then -- as most are
    local key = KEYS[1]
    local kind, _, cost, lifetime, a, b, c, d = unpack('<BBdddddd', ARGV[1])
    local state = state_of(key, kind)
    local after, left, reset, wait, receipt = STEP[kind](state, now, cost, a, b, c, d)
    if wait == 0 and after ~= state then
        call('SET', key, after, 'PX', lifetime)
    end
    return {left, reset, wait, receipt}
end

local held = {} -- by key: the state, false for none
local changed = {} -- by key: the lifetime with which it is to be written
local first = gives + resets + takes

for place = 1, first do
    local key = KEYS[place]
    local kind, _, cost, lifetime, a, b, c, d = unpack('<BBdddddd', ARGV[place])
    local state = held[key]
    if state == nil then
        state = state_of(key, kind)
        held[key] = state
    end
    local after = false
    if place <= gives then
        after = state and GIVE[kind](state, now, cost, ARGV[count + 1 + place], a, b, c)
    elseif place > gives + resets then
        local left, wait, _
        after, left, _, wait = STEP[kind](state, now, cost, a, b, c, d)
        if wait ~= 0 and left > 0 then
            after = STEP[kind](state, now, left < cost and left or cost, a, b, c, d)
        end
    end
    if after ~= state then
        held[key] = after
        changed[key] = lifetime
    end
end

local answer, at = {}, 0
local refused = false
local spent = {} -- by key: the state before the hits
local lasting = {} -- by key: the lifetime
for place = first + 1, count do
    local key = KEYS[place]
    local kind, shadow, cost, lifetime, a, b, c, d = unpack('<BBdddddd', ARGV[place])
    local state = held[key]
    if state == nil then
        state = state_of(key, kind)
        held[key] = state
    end
    local after, left, reset, wait, receipt = STEP[kind](state, now, cost, a, b, c, d)
    answer[at + 1], answer[at + 2], answer[at + 3], answer[at + 4] = left, reset, wait, receipt
    at = at + 4
    if wait ~= 0 then
        refused = refused or shadow == 0
    elseif spend == 1 and after ~= state then
        held[key] = after
        if not receipt then -- a strike, which stands whatever becomes of the rest
            changed[key] = lifetime
        elseif spent[key] == nil then
            spent[key] = state
            lasting[key] = lifetime
        end
    end
end

if not refused then
    for key, lifetime in pairs(lasting) do
        changed[key] = lifetime
    end
elseif spend == 1 then -- nothing is spent, and the verdicts of the others are to show it
    for key, state in pairs(spent) do
        held[key] = state
    end
    for place = first + 1, count do
        at = (place - first) * 4
        if answer[at] then
            local kind, _, _, _, a, b, c, d = unpack('<BBdddddd', ARGV[place])
            local _, left, reset, wait = STEP[kind](held[KEYS[place]], now, 0, a, b, c, d)
            answer[at - 3], answer[at - 2], answer[at - 1], answer[at] = left, reset, wait, false
        end
    end
end

-- All that can go wrong went wrong above: nothing is written by halves.
for key, lifetime in pairs(changed) do
    if held[key] then
        call('SET', key, held[key], 'PX', lifetime)
    else
        call('DEL', key)
    end
end
return answer
