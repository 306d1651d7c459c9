-- What a session says that it is doing, and since when; empty and NULL if it says nothing.
ALTER TABLE peers ADD COLUMN status TEXT NOT NULL DEFAULT '';
ALTER TABLE peers ADD COLUMN status_at INTEGER;
-- Programs that could go on with the schema before this one can go on with it.
UPDATE bus SET oldest = oldest;
