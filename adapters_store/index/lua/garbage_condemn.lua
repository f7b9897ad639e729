-- KEYS condemned, deleting      ARGV hashes      Nobody seems to name these; what is condemned already keeps its time.
for i = 1, #ARGV do
    local deleted = tonumber(redis.call('ZSCORE', KEYS[2], ARGV[i]))
    if not deleted or deleted > 0 then
        redis.call('ZADD', KEYS[1], 'NX', now, ARGV[i])
    end
end
