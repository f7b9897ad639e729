-- KEYS api_keys, api_key_ids, feed      ARGV id, …      Returns 'no_key' or 'done'
local sha256 = redis.call('HGET', KEYS[2], ARGV[1])
if not sha256 then
    return 'no_key'
end
redis.call('HDEL', KEYS[1], sha256)
redis.call('HDEL', KEYS[2], ARGV[1])
announce(KEYS[3], 'key_changed', 'key', ARGV[1])
return 'done'
