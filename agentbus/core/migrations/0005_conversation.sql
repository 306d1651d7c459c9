-- Which conversation a session is, as its client calls it (empty: the client does not say), and the folder that it was
-- named after (empty: its working folder).
ALTER TABLE peers ADD COLUMN conversation TEXT NOT NULL DEFAULT '';
ALTER TABLE peers ADD COLUMN folder TEXT NOT NULL DEFAULT '';
-- With which name a conversation was last here. A table of its own: one process can turn to several conversations.
CREATE TABLE conversations (
    conversation TEXT PRIMARY KEY,
    name         TEXT NOT NULL,
    launch_name  TEXT NOT NULL,
    seen_at      INTEGER NOT NULL
) STRICT;
-- When check_messages handed a message out, where it is not known to whom; NULL once it was answered or handed out again.
ALTER TABLE messages ADD COLUMN shown_at INTEGER;
CREATE INDEX messages_shown ON messages (delivered_to, id) WHERE shown_at IS NOT NULL;
