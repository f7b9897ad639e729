-- ARGV prefixes of the keys of tasks, activations and versions, then the name of each task
-- Reads only; a task and its versions are of one moment. Keys are put together here: a client takes longer to write three
-- for each task than Redis to read them.
-- Returns for each task {settings, revision, active, canary, percent, created, updated, previous, record of the active
-- version, record of the canary}
local tasks = {}
for i = 4, #ARGV do
    local task_key, versions = ARGV[1] .. ARGV[i], ARGV[3] .. ARGV[i]
    local task = redis.call('HMGET', task_key, 'settings', 'revision', 'active', 'canary', 'percent', 'created', 'updated')
    task[8] = redis.call('LINDEX', ARGV[2] .. ARGV[i], 0)
    task[9] = task[3] and redis.call('HGET', versions, task[3])
    task[10] = task[4] and redis.call('HGET', versions, task[4])
    tasks[#tasks + 1] = task
end
return tasks
