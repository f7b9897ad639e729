-- KEYS task, tasks, versions, digests, activations, numbers, feed
-- ARGV name, content ("digest base_fingerprint"), record, "1" to activate, settings of a new task, feed length
-- Returns {number, record, 1 if the version is new}
local name = ARGV[1]
local is_new = 0
local changed = false
if redis.call('EXISTS', KEYS[1]) == 0 then
    create_task(KEYS[1], KEYS[2], name, ARGV[5])
    changed = true
end
local number = redis.call('HGET', KEYS[4], ARGV[2])
if not number then
    number = tostring(redis.call('HINCRBY', KEYS[6], name, 1))
    redis.call('HSET', KEYS[3], number, now .. ' ' .. ARGV[3])
    redis.call('HSET', KEYS[4], ARGV[2], number)
    redis.call('HSET', KEYS[1], 'updated', now)
    is_new = 1
    changed = true
end
if ARGV[4] == '1' then
    changed = switch(KEYS[1], KEYS[5], number) or changed
end
if changed then
    announce(KEYS[7], ARGV[6], 'version_published', name)
end
return {number, redis.call('HGET', KEYS[3], number), is_new}
