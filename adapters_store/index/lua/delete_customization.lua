-- KEYS customizations, user, customization_history, feed, stored_bytes, paid, payers      ARGV user, task, detail for the history, …
-- Returns 'none' or 'done'
redis.call('ZREM', KEYS[2], ARGV[2])
local found = redis.call('HGET', KEYS[1], ARGV[1])
if not found then
    return 'none'
end
redis.call('HDEL', KEYS[1], ARGV[1])
record(KEYS[3], CUSTOMIZATION_HISTORY, 'uncustomized', ARGV[3])
give_customization_back(KEYS[5], KEYS[6], KEYS[7], found)
announce(KEYS[4], 'uncustomized', 'task', ARGV[2], 'user', ARGV[1])
return 'done'
