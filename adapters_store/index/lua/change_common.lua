-- Stands before every script. A script runs as one step: no reader sees half of it.
-- The clock is Redis': the servers' own may differ. The last three arguments of a script that announces or records are
-- the feed's length, the actor and the request id.

local time = redis.call('TIME')
local now = string.format('%d.%06d', time[1], time[2])

local TASK_HISTORY = 1000
local CUSTOMIZATION_HISTORY = 10000

-- Tell every server: the kind, then names and values. The new state is in its keys; the feed only says that there is one.
local function announce(feed, kind, ...)
    redis.call('XADD', feed, 'MAXLEN', '~', ARGV[#ARGV - 2], '*', 'kind', kind, ...)
end

-- Keep who did what. `detail` is a JSON object. The ids count on, so that they say where an entry stands.
local function record(history, length, action, detail)
    local newest = redis.call('LINDEX', history, 0)
    local id = newest and tonumber(string.match(newest, '^%[(%d+)')) or 0
    local who = cjson.encode(action) .. ',' .. cjson.encode(ARGV[#ARGV - 1]) .. ',' .. cjson.encode(ARGV[#ARGV])
    redis.call('LPUSH', history, string.format('[%d,', id + 1) .. now .. ',' .. who .. ',' .. detail .. ']')
    redis.call('LTRIM', history, 0, length - 1)
end

-- How a task stands in the list of all: those of a tenant behind each other, the default tenant's first.
local function listed(name)
    return string.find(name, '/', 1, true) and name or '/' .. name
end

-- Store settings under a revision that no settings of this name ever had.
local function write_settings(task_key, revisions_key, history, name, settings)
    local revision = redis.call('HINCRBY', revisions_key, name, 1)
    redis.call('HSET', task_key, 'settings', settings, 'revision', revision, 'updated', now)
    record(history, TASK_HISTORY, 'task_put', string.format('{"revision":%d,"settings":', revision) .. settings .. '}')
end

local function create_task(task_key, tasks_key, revisions_key, history, name, settings)
    redis.call('HSET', task_key, 'created', now)
    redis.call('ZADD', tasks_key, 0, listed(name))
    write_settings(task_key, revisions_key, history, name, settings)
end

-- Make `number` the active version; it is no canary then.
local function point_to(task_key, number)
    redis.call('HSET', task_key, 'active', number, 'updated', now)
    if redis.call('HGET', task_key, 'canary') == number then
        redis.call('HDEL', task_key, 'canary', 'percent')
    end
end

-- `point_to`, and what was active becomes the newest of the bounded list of earlier ones. Returns whether it changed.
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
    point_to(task_key, number)
    return true
end

-- The history's detail of a task that now points to `number`.
local function moved(number, before)
    return string.format('{"version":%s,"previous":%s}', number, before or 'null')
end

-- Whether a version, as publish.lua stores it, was made for this base ('': any).
local function is_for(base, stored)
    return base == '' or cjson.decode(string.match(stored, ' (.*)$')).base_fingerprint == base
end

-- What API keys have stored. `stored`: key → its bytes in all. Of one task, `paid`: key → its bytes, and `bills`: a
-- version's number → "bytes key"; a customization's record has the same, with a number for the key. What nobody with a
-- key uploads is not counted.
local function charge(stored, paid, key, bytes)
    redis.call('HINCRBY', paid, key, bytes)
    redis.call('HINCRBY', stored, key, bytes)
end

local function take_off(totals, key, bytes)
    if redis.call('HINCRBY', totals, key, '-' .. bytes) <= 0 then
        redis.call('HDEL', totals, key)
    end
end

local function give_back(stored, paid, key, bytes)
    take_off(paid, key, bytes)
    take_off(stored, key, bytes)
end

-- The head of a customization's record, as in packed.py: active version, numbers of base and method, time, number of
-- who pays (0: nobody) and bytes.
local CUSTOMIZATION = '<I4I2I2dI4I8'

local function give_customization_back(stored, paid, payers, customization)
    local _, _, _, _, payer, bytes = struct.unpack(CUSTOMIZATION, customization)
    if payer > 0 then
        give_back(stored, paid, redis.call('HGET', payers, '#' .. payer), string.format('%.0f', bytes))
    end
end

-- Of a whole task: as many steps as keys uploaded to it, however many customizations it has.
local function give_all_back(stored, paid, bills)
    local totals = redis.call('HGETALL', paid)
    for i = 1, #totals, 2 do
        take_off(stored, totals[i], totals[i + 1])
    end
    redis.call('UNLINK', paid, bills)
end

-- Of ARGV, `first` is a time before a change's blobs were put ('': unknown), and what follows up to the last but three
-- are their hashes. Whether one of them is being deleted at this moment, or was after that time: it may be gone again.
local function blobs_deleting(deleting, first)
    local begun = tonumber(ARGV[first]) or math.huge
    for i = first + 1, #ARGV - 3 do
        local deleted = tonumber(redis.call('ZSCORE', deleting, ARGV[i]))
        if deleted and (deleted < 0 or deleted >= begun) then
            return true
        end
    end
    return false
end

-- What a change names is no garbage. Redis lets a script go on beyond its maxmemory once it has written anything, and
-- this needs no room: so it comes last, and the first write is one that Redis refuses when it is full.
local function keep_blobs(condemned, first)
    for i = first + 1, #ARGV - 3 do
        redis.call('ZREM', condemned, ARGV[i])
    end
end

