-- When a message was last given back: a session took it, ended, and its record did not show it. NULL: it never was.
ALTER TABLE messages ADD COLUMN returned_at INTEGER;
UPDATE bus SET oldest = oldest;
