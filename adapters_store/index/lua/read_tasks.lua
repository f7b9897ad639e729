-- KEYS task, activations, versions of each task      Reads only; a task and its versions are of one moment.
-- Returns for each task {settings, revision, active, canary, percent, created, updated, previous, record of the active
-- version, record of the canary}
local tasks = {}
for i = 1, #KEYS, 3 do
    local task = redis.call('HMGET', KEYS[i], 'settings', 'revision', 'active', 'canary', 'percent', 'created', 'updated')
    task[8] = redis.call('LINDEX', KEYS[i + 1], 0)
    task[9] = task[3] and redis.call('HGET', KEYS[i + 2], task[3])
    task[10] = task[4] and redis.call('HGET', KEYS[i + 2], task[4])
    tasks[#tasks + 1] = task
end
return tasks
