-- Which bus this is: told apart by content, as a file can be copied, restored or replaced.
CREATE TABLE bus (id TEXT NOT NULL) STRICT;
INSERT INTO bus (id) VALUES (lower(hex(randomblob(8))));
-- How a session shows that it lives: by its 'lock', or by its 'beat', where no lock can be had (as before this schema).
ALTER TABLE peers ADD COLUMN presence TEXT NOT NULL DEFAULT 'beat';
-- Where the pids of a row mean something: a machine since its last start, and a pid namespace. Empty: unknown.
ALTER TABLE peers ADD COLUMN domain TEXT NOT NULL DEFAULT '';
-- Which session sent a message, so that a name that many had in turn can be told apart.
ALTER TABLE messages ADD COLUMN sender_session TEXT;
