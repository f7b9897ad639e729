-- KEYS condemned, deleting      ARGV hashes
-- Of these, the ones that are still condemned: they are so no longer, and being deleted from now on.
local claimed = {}
for i = 1, #ARGV do
    if redis.call('ZREM', KEYS[1], ARGV[i]) == 1 then
        redis.call('ZADD', KEYS[2], '-' .. now, ARGV[i])
        claimed[#claimed + 1] = ARGV[i]
    end
end
return claimed
