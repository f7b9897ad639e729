-- KEYS leases of a key      ARGV seconds, lease, lease, …      One that was released meanwhile does not come back.
for i = 2, #ARGV do
    redis.call('ZADD', KEYS[1], 'XX', now + ARGV[1], ARGV[i])
end
redis.call('EXPIRE', KEYS[1], ARGV[1])
