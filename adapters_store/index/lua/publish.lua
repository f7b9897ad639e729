-- KEYS task, tasks, versions, digests, activations, numbers, revisions, condemned, deleting, history, feed, stored_bytes,
-- paid, bills
-- ARGV name, content ("digest base_fingerprint"), digest, record, "1" to activate, settings of a new task, bytes, a time
-- before the blobs were put, hashes of the blobs…, …
-- Returns 'retry' where a blob is being deleted or was since, else {number, record, 1 if the version is new}
local name = ARGV[1]
local is_new = 0
local changed = false
if blobs_deleting(KEYS[9], 8) then
    return 'retry'
end
if redis.call('EXISTS', KEYS[1]) == 0 then
    create_task(KEYS[1], KEYS[2], KEYS[7], KEYS[10], name, ARGV[6])
    changed = true
end
local before = redis.call('HGET', KEYS[1], 'active')
local number = redis.call('HGET', KEYS[4], ARGV[2])
if not number then
    number = tostring(redis.call('HINCRBY', KEYS[6], name, 1))
    redis.call('HSET', KEYS[3], number, now .. ' ' .. ARGV[4])
    redis.call('HSET', KEYS[4], ARGV[2], number)
    redis.call('HSET', KEYS[1], 'updated', now)
    local payer = ARGV[#ARGV - 1]
    if payer ~= '' then
        redis.call('HSET', KEYS[14], number, ARGV[7] .. ' ' .. payer)
        charge(KEYS[12], KEYS[13], payer, ARGV[7])
    end
    is_new = 1
    changed = true
end
local activated = ARGV[5] == '1' and switch(KEYS[1], KEYS[5], number)
if is_new == 1 then
    local detail = '{"version":%s,"digest":%s,"activated":%s}'
    detail = string.format(detail, number, cjson.encode(ARGV[3]), tostring(activated))
    record(KEYS[10], TASK_HISTORY, 'version_published', detail)
elseif activated then
    record(KEYS[10], TASK_HISTORY, 'version_activated', moved(number, before))
end
keep_blobs(KEYS[8], 8)
if changed or activated then
    announce(KEYS[11], 'version_published', 'task', name)
end
return {number, redis.call('HGET', KEYS[3], number), is_new}
