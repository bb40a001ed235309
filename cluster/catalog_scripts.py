"""What happens in Redis: the catalog's scripts. Each runs as one step.

KEYS of all: state, catalog. ARGV[1] of all but FOUND: the channel of changes. A change names the
state that its caller knows; if Redis is not settled, or has an older state, nothing changes.
"""

_HEAD = """
local channel = ARGV[1]
local info = redis.pcall('INFO', 'server')
local server = type(info) == 'string' and string.match(info, 'run_id:(%w+)') or 'unknown'
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local head = redis.call('HMGET', KEYS[1], 'generation', 'sequence', 'count', 'settled_by',
  'settling')
local generation, sequence = tonumber(head[1]) or 0, tonumber(head[2]) or 0
local held = redis.call('HLEN', KEYS[2])
local settled = generation > 0 and not head[5] and head[4] == server and tonumber(head[3]) == held

local function whole(number) return string.format('%.0f', number) end

local function publish(generation, sequence, records)
  redis.call('PUBLISH', channel, '{"generation":' .. whole(generation) .. ',"sequence":'
    .. whole(sequence) .. ',"records":{' .. table.concat(records, ',') .. '}}')
end

local function entry(name, record) return cjson.encode(name) .. ':' .. cjson.encode(record) end

local function commit(records)
  redis.call('HSET', KEYS[1], 'sequence', whole(sequence + 1), 'count', redis.call('HLEN', KEYS[2]))
  publish(generation, sequence + 1, records)
  return whole(sequence + 1)
end

-- What cannot be read is older than anything.
local function decoded(record)
  local fine, data = pcall(cjson.decode, record or '')
  if fine and type(data) == 'table' and type(data.stamp) == 'table' then return data end
  return {stamp = {0, 0}, run = '', version = cjson.null}
end

local function settle(known_generation, known_sequence)
  generation = math.max(now_ms, generation + 1, known_generation + 1)
  sequence = math.max(sequence, known_sequence)
  redis.call('HSET', KEYS[1], 'generation', whole(generation), 'sequence', whole(sequence),
    'count', held, 'settled_by', server)
  redis.call('HDEL', KEYS[1], 'settling')
end
"""

# ARGV: channel, generation, sequence that the caller knows.
_CHANGE = (
    _HEAD
    + """
if not settled or whole(generation) ~= ARGV[2] or sequence < tonumber(ARGV[3]) then
  return {'unsettled', ''}
end
local function record(run, version)
  return '{"stamp":[' .. whole(generation) .. ',' .. whole(sequence + 1) .. '],"run":'
    .. cjson.encode(run) .. ',"version":' .. version .. '}'
end
"""
)

# ARGV: '1' if existing names may be replaced, run ('' for a change by the API), then name, version,
# name, version ... All names change, or none.
PUT = (
    _CHANGE
    + """
local inplace, run = ARGV[4] == '1', ARGV[5]
local changes = {}
for i = 6, #ARGV, 2 do
  local name, version = ARGV[i], ARGV[i + 1]
  local current = decoded(redis.call('HGET', KEYS[2], name))
  local before, after = current.version, cjson.decode(version)
  local exists = type(before) == 'table'
  local alike = exists and before.digest == after.digest and before.pinned == after.pinned
    and before.weight == after.weight
  local same = alike and before.uri == after.uri
  if run ~= '' then
    same = current.run == run
  elseif exists and not alike and not inplace then
    return {'taken', name}
  end
  if not same then
    changes[#changes + 1] = {name, record(run ~= '' and run or current.run or '', version)}
  end
end
if #changes == 0 then return {'same', whole(sequence)} end
local entries = {}
for i, change in ipairs(changes) do
  redis.call('HSET', KEYS[2], change[1], change[2])
  entries[i] = entry(change[1], change[2])
end
return {'put', commit(entries)}
"""
)

# ARGV: name. Returns the record that the name had.
REMOVE = (
    _CHANGE
    + """
local name = ARGV[4]
local before = redis.call('HGET', KEYS[2], name)
local current = decoded(before)
if type(current.version) ~= 'table' then return {'absent', ''} end
local removed = record(current.run or '', 'null')
redis.call('HSET', KEYS[2], name, removed)
return {before, commit({entry(name, removed)})}
"""
)

# ARGV: digests (JSON array) whose files may have been repaired.
RETRY = (
    _CHANGE
    + """
redis.call('HSET', KEYS[1], 'sequence', whole(sequence + 1))
redis.call('PUBLISH', channel, '{"generation":' .. whole(generation) .. ',"sequence":'
  .. whole(sequence + 1) .. ',"records":{},"again":' .. ARGV[4] .. '}')
return {'put', whole(sequence + 1)}
"""
)

# ARGV: name, record, name, record ... Those that are newer than what Redis has stay, as they are.
MERGE = (
    _HEAD
    + """
local entries, latest = {}, sequence
for i = 2, #ARGV, 2 do
  local name, record = ARGV[i], ARGV[i + 1]
  local before, after = decoded(redis.call('HGET', KEYS[2], name)).stamp, decoded(record).stamp
  if before[1] < after[1] or (before[1] == after[1] and before[2] < after[2]) then
    redis.call('HSET', KEYS[2], name, record)
    entries[#entries + 1] = entry(name, record)
    latest = math.max(latest, after[2])
  end
end
if settled then
  if #entries > 0 then commit(entries) end
else
  redis.call('HSET', KEYS[1], 'sequence', whole(latest))
end
"""
)

# ARGV: what `settling` was for the caller. A generation of 0 makes everyone look.
BEGIN = (
    _HEAD
    + """
if (head[5] or '') ~= ARGV[2] then return end
redis.call('HSET', KEYS[1], 'settling', server .. ':' .. whole(now_ms))
publish(0, 0, {})
"""
)

# ARGV: what `settling` is for the caller, ms that it must have lasted, generation and sequence that
# the caller knows.
SETTLE = (
    _HEAD
    + """
local settling_server, since_ms = string.match(head[5] or '', '^(%w+):(%d+)$')
if head[5] ~= ARGV[2] or settling_server ~= server then return end
local passed_ms = now_ms - tonumber(since_ms)
if passed_ms < tonumber(ARGV[3]) then return end
settle(tonumber(ARGV[4]), tonumber(ARGV[5]))
publish(generation, sequence, {})
"""
)

# ARGV: nothing, or 'configured' and the names that flags set: what earlier flags set goes.
FOUND = (
    _HEAD
    + """
local configured = {}
for i = 2, #ARGV do configured[ARGV[i]] = true end
if ARGV[1] == 'configured' then
  local records = redis.call('HGETALL', KEYS[2])
  for i = 1, #records, 2 do
    if not configured[records[i]] and (decoded(records[i + 1]).run or '') ~= '' then
      redis.call('HDEL', KEYS[2], records[i])
    end
  end
  held = redis.call('HLEN', KEYS[2])
end
if settled then redis.call('HSET', KEYS[1], 'count', held) else settle(0, 0) end
"""
)

# ARGV: name, record, name, record ... of removals to forget.
FORGET = (
    _HEAD
    + """
if not settled then return end
local forgotten = false
for i = 2, #ARGV, 2 do
  if redis.call('HGET', KEYS[2], ARGV[i]) == ARGV[i + 1] then
    redis.call('HDEL', KEYS[2], ARGV[i])
    forgotten = true
  end
end
if forgotten then commit({}) end
"""
)

SNAPSHOT = (
    _HEAD
    + """
return {head[1], head[2], head[3], head[4], head[5], server, held, whole(now_ms),
  redis.call('HGETALL', KEYS[2])}
"""
)
