-- KEYS task, versions, activations, history, feed      ARGV name, number, base ("": any), …
-- Returns 'no_task', 'no_version', 'base_mismatch' or 'done'
if redis.call('EXISTS', KEYS[1]) == 0 then
    return 'no_task'
end
local stored = redis.call('HGET', KEYS[2], ARGV[2])
if not stored then
    return 'no_version'
elseif not is_for(ARGV[3], stored) then
    return 'base_mismatch'
end
local before = redis.call('HGET', KEYS[1], 'active')
if switch(KEYS[1], KEYS[3], ARGV[2]) then
    record(KEYS[4], TASK_HISTORY, 'version_activated', moved(ARGV[2], before))
    announce(KEYS[5], 'version_activated', 'task', ARGV[1])
end
return 'done'
