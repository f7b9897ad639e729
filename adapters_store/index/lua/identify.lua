-- KEYS index_id, schema, feed      ARGV a fresh id, schema, …
-- Returns {id, schema}: those that stand, or those given in a Redis that has none. The feed's first entry is made here:
-- a follower always has an entry to stand on, and knows that it missed something when that one is gone.
-- Where there is one nothing is written, so that a server starts also while Redis is full.
if redis.call('EXISTS', KEYS[1]) == 0 then
    redis.call('SET', KEYS[1], ARGV[1])
    redis.call('SET', KEYS[2], ARGV[2])
end
if redis.call('XLEN', KEYS[3]) == 0 then
    announce(KEYS[3], 'feed_begun')
end
return {redis.call('GET', KEYS[1]), redis.call('GET', KEYS[2])}
