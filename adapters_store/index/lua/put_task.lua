-- KEYS task, tasks, revisions, public, history, feed
-- ARGV name, settings, id, "1" if public, the revision that is to be replaced ("0": no task; "": any), …
-- Returns 'changed_meanwhile', 'public_name_taken' or 'done'
local exists = redis.call('EXISTS', KEYS[1]) == 1
if ARGV[5] ~= '' and ARGV[5] ~= (redis.call('HGET', KEYS[1], 'revision') or '0') then
    return 'changed_meanwhile'
end
local shown = redis.call('HGET', KEYS[4], ARGV[3])
if ARGV[4] == '1' then
    if shown and shown ~= ARGV[1] then
        return 'public_name_taken'
    end
    redis.call('HSET', KEYS[4], ARGV[3], ARGV[1])
elseif shown == ARGV[1] then
    redis.call('HDEL', KEYS[4], ARGV[3])
end
if exists then
    write_settings(KEYS[1], KEYS[3], KEYS[5], ARGV[1], ARGV[2])
else
    create_task(KEYS[1], KEYS[2], KEYS[3], KEYS[5], ARGV[1], ARGV[2])
end
announce(KEYS[6], 'task_put', 'task', ARGV[1])
return 'done'
