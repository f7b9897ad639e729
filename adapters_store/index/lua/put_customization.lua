-- KEYS task, customizations, user, condemned, deleting, customization_history, feed, stored_bytes, paid, payers, words
-- ARGV user, task, packed record, detail for the history, bytes, base fingerprint, method, a time before the blobs were
-- put, hashes of the blobs…, …
-- Returns 'no_task', 'retry' where a blob is being deleted or was since, or {active version or '0', time}
if redis.call('EXISTS', KEYS[1]) == 0 then
    return 'no_task'
end
if blobs_deleting(KEYS[5], 8) then
    return 'retry'
end
local function number_of(word)
    redis.call('HSETNX', KEYS[11], word, redis.call('HLEN', KEYS[11]))
    return tonumber(redis.call('HGET', KEYS[11], word))
end
local function number_of_payer(payer)
    local number = redis.call('HGET', KEYS[10], payer)
    if not number then
        number = redis.call('HLEN', KEYS[10]) / 2 + 1
        redis.call('HSET', KEYS[10], payer, number, '#' .. number, payer)
    end
    return tonumber(number)
end
local active = redis.call('HGET', KEYS[1], 'active') or '0'
local base, method = number_of(ARGV[6]), number_of(ARGV[7])
local before = redis.call('HGET', KEYS[2], ARGV[1])
if before then
    give_customization_back(KEYS[8], KEYS[9], KEYS[10], before)
end
local payer, bytes = ARGV[#ARGV - 1], 0
local number = 0
if payer ~= '' then
    number, bytes = number_of_payer(payer), tonumber(ARGV[5])
    charge(KEYS[8], KEYS[9], payer, ARGV[5])
end
local header = struct.pack(CUSTOMIZATION, tonumber(active), base, method, tonumber(now), number, bytes)
redis.call('HSET', KEYS[2], ARGV[1], header .. ARGV[3])
redis.call('ZADD', KEYS[3], 0, ARGV[2])
keep_blobs(KEYS[4], 8)
record(KEYS[6], CUSTOMIZATION_HISTORY, 'customized', ARGV[4])
announce(KEYS[7], 'customized', 'task', ARGV[2], 'user', ARGV[1])
return {active, now}
