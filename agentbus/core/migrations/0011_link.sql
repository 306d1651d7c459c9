-- Other machines. A message for one has its name in `host` (NULL: it is for this machine), and `bus`, under which it was
-- inserted: with the id, that is its name in the world. It left at relayed_at, and was committed there at arrived_at;
-- `refused` is the reason if it never will be.
ALTER TABLE messages ADD COLUMN host TEXT;
ALTER TABLE messages ADD COLUMN bus TEXT;
ALTER TABLE messages ADD COLUMN relayed_at INTEGER;
ALTER TABLE messages ADD COLUMN arrived_at INTEGER;
ALTER TABLE messages ADD COLUMN refused TEXT;
-- A message from another machine: its origin there (MACHINE.BUS and its id), and what was reported back: 1 arrived, 2
-- delivered, 3 read.
ALTER TABLE messages ADD COLUMN origin TEXT;
ALTER TABLE messages ADD COLUMN origin_id INTEGER;
ALTER TABLE messages ADD COLUMN reported INTEGER;
CREATE INDEX messages_outbound ON messages (id) WHERE host IS NOT NULL AND relayed_at IS NULL AND refused IS NULL;
CREATE INDEX messages_unconfirmed ON messages (host, id) WHERE host IS NOT NULL AND arrived_at IS NULL;
CREATE INDEX messages_unreported ON messages (id)
    WHERE origin IS NOT NULL AND reported < 1 + (delivered_at IS NOT NULL) + (read_at IS NOT NULL);
-- What was taken in from other machines, for as long as a copy of it can still come.
CREATE TABLE imports (
    origin    TEXT NOT NULL,
    origin_id INTEGER NOT NULL,
    row_id    INTEGER NOT NULL,
    digest    TEXT NOT NULL,
    at        INTEGER NOT NULL,
    PRIMARY KEY (origin, origin_id)
) WITHOUT ROWID, STRICT;
CREATE INDEX imports_at ON imports (at);
-- The machines that were heard of. peers: what each last said about its peers, as JSON. gone_at: NULL while it is there.
CREATE TABLE machines (
    name    TEXT PRIMARY KEY,
    bus     TEXT NOT NULL,
    version INTEGER NOT NULL,
    seen_at INTEGER NOT NULL,
    gone_at INTEGER,
    skew_ms INTEGER NOT NULL,
    peers   TEXT NOT NULL
) STRICT;
-- What this machine is called among them, and how its link to them is.
CREATE TABLE link (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT;

-- Programs of before can go on, until this home has a link: then it says so itself.
UPDATE bus SET oldest = oldest;
