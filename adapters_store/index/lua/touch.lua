-- KEYS tasks, last_used      ARGV name, time, name, time, …      A task that was deleted meanwhile leaves no trace.
for i = 1, #ARGV, 2 do
    if redis.call('ZSCORE', KEYS[1], listed(ARGV[i])) then
        redis.call('ZADD', KEYS[2], 'GT', ARGV[i + 1], ARGV[i])
    end
end
