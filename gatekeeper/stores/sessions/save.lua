-- Writes a session, if it is still as it was read. The answer: 1; what is there instead; nil if it is gone.
--
-- A session is a string: 16 digits of its version, 64 of its owner's digest (dashes for nobody's), and its data.
-- KEYS: the session; and, if it has an owner whose list is to be reached from here, that list. ARGV: the version that
-- was read, empty for a session that must not be there; the new session; its time to live in milliseconds; its key;
-- what the names of all lists begin with, empty where they are not to be reached from here.

local there = call('GET', KEYS[1])
if ARGV[1] == '' then
    if there then
        return there
    end
elseif not there then
    return false
elseif string.sub(there, 1, 16) ~= ARGV[1] then
    return there
end

-- This first: what takes memory is refused by a full server only as long as the script has written nothing.
call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
if there and ARGV[5] ~= '' then
    local before = string.sub(there, 17, 80)
    if before ~= string.sub(ARGV[2], 17, 80) then
        call('ZREM', ARGV[5] .. before .. '}', ARGV[4])
    end
end
if KEYS[2] then
    list(KEYS[2], ARGV[4], ARGV[3])
end
return 1
