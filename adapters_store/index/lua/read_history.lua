-- KEYS history      ARGV how many, the id before which ("": from the newest)      Reads only.
-- Returns the entries, newest first. The newest stands at 0 and the ids count, so an id says where its entry stands.
local from = 0
if ARGV[2] ~= '' then
    local newest = redis.call('LINDEX', KEYS[1], 0)
    if not newest then
        return {}
    end
    from = math.max(0, tonumber(string.match(newest, '^%[(%d+)')) - tonumber(ARGV[2]) + 1)
end
return redis.call('LRANGE', KEYS[1], from, from + ARGV[1] - 1)
