-- KEYS task, versions, digests, activations, feed      ARGV name, number, content ("digest base_fingerprint"), feed length
-- Returns 'no_version', 'active' or 'done'
if redis.call('HEXISTS', KEYS[2], ARGV[2]) == 0 then
    return 'no_version'
end
if redis.call('HGET', KEYS[1], 'active') == ARGV[2] then
    return 'active'
end
redis.call('HDEL', KEYS[2], ARGV[2])
redis.call('HDEL', KEYS[3], ARGV[3])
redis.call('LREM', KEYS[4], 0, ARGV[2])
redis.call('HSET', KEYS[1], 'updated', now)
announce(KEYS[5], ARGV[4], 'version_deleted', ARGV[1])
return 'done'
