-- KEYS task, tasks, feed      ARGV name, settings, feed length
if redis.call('EXISTS', KEYS[1]) == 0 then
    create_task(KEYS[1], KEYS[2], ARGV[1], ARGV[2])
else
    redis.call('HSET', KEYS[1], 'settings', ARGV[2], 'updated', now)
end
announce(KEYS[3], ARGV[3], 'task_put', ARGV[1])
