-- KEYS task, activations, versions of each task      Reads only; a task and its active version are of one moment.
-- Returns for each task {settings, active, canary, created, updated, previous, record of the active version}
local tasks = {}
for i = 1, #KEYS, 3 do
    local task = redis.call('HMGET', KEYS[i], 'settings', 'active', 'canary', 'created', 'updated')
    task[6] = redis.call('LINDEX', KEYS[i + 1], 0)
    task[7] = task[2] and redis.call('HGET', KEYS[i + 2], task[2])
    tasks[#tasks + 1] = task
end
return tasks
