-- KEYS task, tasks, versions, digests, activations, customizations, last_used, public, history, feed,
-- stored_bytes, paid, bills      ARGV name, id, …
-- Returns 'no_task' or 'done'. The last version number and revision stay, so that a later task of this name goes on from
-- them; so does the history. A million customizations are freed on another thread.
if redis.call('DEL', KEYS[1]) == 0 then
    return 'no_task'
end
redis.call('UNLINK', KEYS[3], KEYS[4], KEYS[5], KEYS[6])
redis.call('ZREM', KEYS[2], listed(ARGV[1]))
redis.call('ZREM', KEYS[7], ARGV[1])
if redis.call('HGET', KEYS[8], ARGV[2]) == ARGV[1] then
    redis.call('HDEL', KEYS[8], ARGV[2])
end
record(KEYS[9], TASK_HISTORY, 'task_deleted', '{}')
give_all_back(KEYS[11], KEYS[12], KEYS[13])
announce(KEYS[10], 'task_deleted', 'task', ARGV[1])
return 'done'
