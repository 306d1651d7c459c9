-- What holds for the whole bus, and not for one process of it. A key that is not here has its default.
CREATE TABLE settings (
    key   TEXT PRIMARY KEY,
    value INTEGER NOT NULL
) STRICT;

-- The oldest schema whose programs can go on with this file: they compare it with their own when the file is newer.
-- Each migration after this one says so, for all programs before it: UPDATE bus SET oldest = its own number if they
-- cannot go on, and the former value if they can.
ALTER TABLE bus ADD COLUMN oldest INTEGER NOT NULL DEFAULT 0;
UPDATE bus SET oldest = 7;

-- The text of a message that does not fit into a page with the rest of its row. SQLite writes a row anew with each
-- mark, with all its text. Here it is written once. What stands in its place in `body` is for programs that were started
-- before this schema.
CREATE TABLE bodies (
    id   INTEGER PRIMARY KEY REFERENCES messages (id) ON DELETE CASCADE,
    text TEXT NOT NULL
) STRICT;
