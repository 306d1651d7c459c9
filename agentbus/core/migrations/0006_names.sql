-- From which session a message is kept: it waited under a name that this session took later, by a rename. Its pending
-- messages are not for it, and neither is what an earlier session of the name took and is not known to have read.
ALTER TABLE messages ADD COLUMN kept_from TEXT;
CREATE INDEX messages_kept ON messages (kept_from) WHERE kept_from IS NOT NULL;
-- What a session was called before. Its messages up to newest_id were sent under that name, or under an earlier one.
CREATE TABLE renames (
    session   TEXT NOT NULL REFERENCES peers (session) ON DELETE CASCADE,
    was       TEXT NOT NULL,
    newest_id INTEGER NOT NULL
) STRICT;
CREATE INDEX renames_session ON renames (session);
