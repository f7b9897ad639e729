-- KEYS index_id, feed, condemned, deleting, restored, then keys of which there must be none
-- ARGV the namespaces of the restored keys and of the index, a time before the blobs were put, a fresh id, …
-- The last step of a restore: all its keys get their names. Returns 'not_empty', 'retry' where blobs were deleted since
-- that time or are being so, or 'done'. Some microseconds per key, for which Redis does nothing else.
for i = 6, #KEYS do
    if redis.call('EXISTS', KEYS[i]) == 1 then
        return 'not_empty'
    end
end
if redis.call('ZCOUNT', KEYS[4], '-inf', '(0') + redis.call('ZCOUNT', KEYS[4], ARGV[3], '+inf') > 0 then
    return 'retry'
end
redis.call('UNLINK', KEYS[3])
while true do
    local names = redis.call('SPOP', KEYS[5], 500)
    if #names == 0 then
        break
    end
    for _, name in ipairs(names) do
        redis.call('RENAME', ARGV[1] .. name, ARGV[2] .. name)
    end
end
-- Another index than before: who mirrors it reads everything anew.
redis.call('SET', KEYS[1], ARGV[4])
redis.call('DEL', KEYS[2])
announce(KEYS[2], 'feed_begun')
return 'done'
