-- The first schema. Instants are milliseconds since 1970 UTC. A shipped migration is never edited again.

-- A session: present while left_at is NULL; a row that has left remembers the name for its host's next server.
CREATE TABLE peers (
    session      TEXT PRIMARY KEY,
    name         TEXT NOT NULL,
    host_pid     INTEGER NOT NULL,
    host_started TEXT NOT NULL,
    launch_name  TEXT NOT NULL,
    pid          INTEGER NOT NULL,
    pid_started  TEXT NOT NULL,
    runtime      TEXT NOT NULL,
    cwd          TEXT NOT NULL,
    delivery     TEXT NOT NULL,
    trigger      TEXT NOT NULL,
    endpoint     TEXT NOT NULL,
    started_at   INTEGER NOT NULL,
    last_seen    INTEGER NOT NULL,
    left_at      INTEGER
) STRICT;
-- Two present sessions never share a name.
CREATE UNIQUE INDEX peers_present ON peers (name) WHERE left_at IS NULL;
CREATE INDEX peers_host ON peers (host_pid, launch_name);

-- A name that a session had before: it leads to the session until that ends or another claims the name.
CREATE TABLE aliases (
    alias   TEXT PRIMARY KEY,
    session TEXT NOT NULL REFERENCES peers (session) ON DELETE CASCADE
) STRICT;
CREATE INDEX aliases_session ON aliases (session);

-- AUTOINCREMENT: a pruned id is never given out again, so an id names one message for good.
CREATE TABLE messages (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,
    sender       TEXT NOT NULL,
    recipient    TEXT NOT NULL,
    body         TEXT NOT NULL,
    reply_to     INTEGER,
    sent_at      INTEGER NOT NULL,
    delivered_at INTEGER,
    carrier      TEXT,
    delivered_to TEXT,
    read_at      INTEGER,
    CHECK (read_at IS NULL OR delivered_at IS NOT NULL)
) STRICT;
-- Partial, so that what a send or a drain costs does not grow with the history.
CREATE INDEX messages_pending ON messages (recipient, id) WHERE delivered_at IS NULL;
CREATE INDEX messages_delivered ON messages (delivered_at) WHERE delivered_at IS NOT NULL;
