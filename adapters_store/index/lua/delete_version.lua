-- KEYS task, versions, digests, activations, history, feed, stored_bytes, paid, bills
-- ARGV name, number, content ("digest base_fingerprint"), …
-- Returns 'no_version', 'version_active', 'version_canary' or 'done'
if redis.call('HEXISTS', KEYS[2], ARGV[2]) == 0 then
    return 'no_version'
end
if redis.call('HGET', KEYS[1], 'active') == ARGV[2] then
    return 'version_active'
end
if redis.call('HGET', KEYS[1], 'canary') == ARGV[2] then
    return 'version_canary'
end
redis.call('HDEL', KEYS[2], ARGV[2])
redis.call('HDEL', KEYS[3], ARGV[3])
redis.call('LREM', KEYS[4], 0, ARGV[2])
redis.call('HSET', KEYS[1], 'updated', now)
record(KEYS[5], TASK_HISTORY, 'version_deleted', string.format('{"version":%s}', ARGV[2]))
local bill = redis.call('HGET', KEYS[9], ARGV[2])
if bill then
    local bytes, payer = string.match(bill, '^(%d+) (.*)$')
    redis.call('HDEL', KEYS[9], ARGV[2])
    give_back(KEYS[7], KEYS[8], payer, bytes)
end
announce(KEYS[6], 'version_deleted', 'task', ARGV[1])
return 'done'
