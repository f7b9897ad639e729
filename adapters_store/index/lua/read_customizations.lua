-- KEYS words, a task      ARGV user, prefix of the keys of customizations, then the name of each task
-- Reads only. Returns {all words and their numbers, when the task was made, the user's customization of each task}
local rows = {redis.call('HGETALL', KEYS[1]), redis.call('HGET', KEYS[2], 'created')}
for i = 3, #ARGV do
    rows[i] = redis.call('HGET', ARGV[2] .. ARGV[i], ARGV[1])
end
return rows
