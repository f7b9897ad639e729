-- KEYS task, tasks, versions, digests, activations, last_used, feed      ARGV name, feed length
-- Returns 'no_task' or 'done'. The last version number stays, so that a later task of this name goes on from it.
if redis.call('DEL', KEYS[1]) == 0 then
    return 'no_task'
end
redis.call('DEL', KEYS[3], KEYS[4], KEYS[5])
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('ZREM', KEYS[6], ARGV[1])
announce(KEYS[7], ARGV[2], 'task_deleted', ARGV[1])
return 'done'
