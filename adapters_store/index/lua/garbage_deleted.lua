-- KEYS deleting      ARGV seconds for which it is remembered, hashes      These have been deleted.
for i = 2, #ARGV do
    redis.call('ZADD', KEYS[1], now, ARGV[i])
end
redis.call('ZREMRANGEBYSCORE', KEYS[1], 0, now - ARGV[1])
