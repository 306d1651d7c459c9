-- How it is known that a message was read: 'transcript', 'check' or 'reply'. NULL: not read, or before this schema.
ALTER TABLE messages ADD COLUMN read_by TEXT;
-- Where the client itself records what the model of a session was given, one place a line. Empty: no such record is to
-- be had. NULL: nothing asks for it, as of a program, of a session that only pulls, or before this schema.
ALTER TABLE peers ADD COLUMN proof TEXT;
-- The sessions of the past whose mail is still open: few, however long the past is.
CREATE INDEX peers_unproven ON peers (name) WHERE left_at IS NOT NULL AND proof IS NOT NULL;
