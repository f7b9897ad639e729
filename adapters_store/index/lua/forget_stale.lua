-- KEYS user, then customizations of each task      ARGV user, then the name of each task
-- Takes those tasks off the user's list that have nothing of the user any longer.
for i = 2, #KEYS do
    if redis.call('HEXISTS', KEYS[i], ARGV[1]) == 0 then
        redis.call('ZREM', KEYS[1], ARGV[i])
    end
end
