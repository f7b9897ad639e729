-- KEYS task, versions, activations, feed      ARGV name, number, feed length
-- Returns 'no_task', 'no_version' or 'done'
if redis.call('EXISTS', KEYS[1]) == 0 then
    return 'no_task'
end
if redis.call('HEXISTS', KEYS[2], ARGV[2]) == 0 then
    return 'no_version'
end
if switch(KEYS[1], KEYS[3], ARGV[2]) then
    announce(KEYS[4], ARGV[3], 'version_activated', ARGV[1])
end
return 'done'
