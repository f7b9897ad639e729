-- Stands before every change script. A script runs as one step: no reader sees half of it.
-- The clock is Redis': the servers' own may differ.

local time = redis.call('TIME')
local now = string.format('%d.%06d', time[1], time[2])

-- Tell every server. The task's new state is in its keys; the feed only says that there is one.
local function announce(feed, length, kind, task)
    redis.call('XADD', feed, 'MAXLEN', '~', length, '*', 'kind', kind, 'task', task)
end

local function create_task(task_key, tasks_key, name, settings)
    redis.call('HSET', task_key, 'settings', settings, 'created', now, 'updated', now)
    redis.call('ZADD', tasks_key, 0, name)
end

-- Make `number` the active version; what was active becomes the newest of the bounded list of earlier ones.
local function switch(task_key, activations_key, number)
    local before = redis.call('HGET', task_key, 'active')
    if before == number then
        return false
    end
    redis.call('LREM', activations_key, 0, number)
    if before then
        redis.call('LPUSH', activations_key, before)
        redis.call('LTRIM', activations_key, 0, 31)
    end
    redis.call('HSET', task_key, 'active', number, 'updated', now)
    return true
end

