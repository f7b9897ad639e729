-- KEYS user, customization_history, feed, stored_bytes, payers
-- ARGV user, prefixes of the keys of customizations and paid, at most how many, …
-- Deletes that many of the user's customizations. Returns {how many of them there were, 1 if none is left}
local tasks = redis.call('ZRANGE', KEYS[1], 0, ARGV[4] - 1)
local found = 0
for _, task in ipairs(tasks) do
    local customization = redis.call('HGET', ARGV[2] .. task, ARGV[1])
    if customization then
        found = found + redis.call('HDEL', ARGV[2] .. task, ARGV[1])
        give_customization_back(KEYS[4], ARGV[3] .. task, KEYS[5], customization)
    end
    redis.call('ZREM', KEYS[1], task)
end
if found > 0 then
    local detail = string.format('{"user":%s,"customizations":%d}', cjson.encode(ARGV[1]), found)
    record(KEYS[2], CUSTOMIZATION_HISTORY, 'user_deleted', detail)
    announce(KEYS[3], 'user_deleted', 'user', ARGV[1])
end
return {found, 1 - redis.call('EXISTS', KEYS[1])}
