-- KEYS task, versions, digests, activations, history, bills, last_used      ARGV name      Reads only.
-- All of a task but its customizations, of one moment: {task, versions, digests, activations, history, bills,
-- {last use} or {}}; hashes as fields and values in turn
return {
    redis.call('HGETALL', KEYS[1]),
    redis.call('HGETALL', KEYS[2]),
    redis.call('HGETALL', KEYS[3]),
    redis.call('LRANGE', KEYS[4], 0, -1),
    redis.call('LRANGE', KEYS[5], 0, -1),
    redis.call('HGETALL', KEYS[6]),
    {redis.call('ZSCORE', KEYS[7], ARGV[1]) or nil},
}
