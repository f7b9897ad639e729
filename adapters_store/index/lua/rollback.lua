-- KEYS task, versions, activations, history, feed      ARGV name, base ("": any), …
-- Returns 'no_task', 'no_previous', 'base_mismatch' or 'done'. What is left does not become an earlier version: a second rollback goes
-- further back, and not forward again.
if redis.call('EXISTS', KEYS[1]) == 0 then
    return 'no_task'
end
local number = redis.call('LINDEX', KEYS[3], 0)
if not number then
    return 'no_previous'
elseif not is_for(ARGV[2], redis.call('HGET', KEYS[2], number)) then
    return 'base_mismatch'
end
redis.call('LPOP', KEYS[3])
local before = redis.call('HGET', KEYS[1], 'active')
point_to(KEYS[1], number)
record(KEYS[4], TASK_HISTORY, 'task_rolled_back', moved(number, before))
announce(KEYS[5], 'version_activated', 'task', ARGV[1])
return 'done'
