-- KEYS task, versions      Reads only, which Redis lets a script do when it is full, and a transaction not.
-- Returns numbers and records in turn, or nil where there is no task
if redis.call('EXISTS', KEYS[1]) == 0 then
    return false
end
return redis.call('HGETALL', KEYS[2])
