-- KEYS api_keys, api_key_ids, feed      ARGV id, sha256 of the text, record, …
-- Returns what was stored: the time, a space, the record
local stored = now .. ' ' .. ARGV[3]
redis.call('HSET', KEYS[1], ARGV[2], stored)
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
announce(KEYS[3], 'key_changed', 'key', ARGV[1])
return stored
