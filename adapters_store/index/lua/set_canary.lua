-- KEYS task, versions, history, feed      ARGV name, number ("": none), percent, base ("": any), …
-- Returns 'no_task', 'no_active_version', 'no_version', 'version_active', 'base_mismatch' or 'done'
if redis.call('EXISTS', KEYS[1]) == 0 then
    return 'no_task'
end
if ARGV[2] == '' then
    if redis.call('HDEL', KEYS[1], 'canary', 'percent') == 0 then
        return 'done'
    end
    record(KEYS[3], TASK_HISTORY, 'canary_set', '{"version":null,"percent":null}')
else
    local active = redis.call('HGET', KEYS[1], 'active')
    local stored = redis.call('HGET', KEYS[2], ARGV[2])
    if not stored then
        return 'no_version'
    elseif not active then
        return 'no_active_version'
    elseif active == ARGV[2] then
        return 'version_active'
    elseif not is_for(ARGV[4], stored) then
        return 'base_mismatch'
    end
    redis.call('HSET', KEYS[1], 'canary', ARGV[2], 'percent', ARGV[3])
    record(KEYS[3], TASK_HISTORY, 'canary_set', string.format('{"version":%s,"percent":%s}', ARGV[2], ARGV[3]))
end
redis.call('HSET', KEYS[1], 'updated', now)
announce(KEYS[4], 'canary_set', 'task', ARGV[1])
return 'done'
