-- Who is in which group: names, and not sessions, so that it outlives them as mailboxes do. A group has its @ in its
-- name. `seen_at`: when a session of that name was last there, or when the member joined.
CREATE TABLE group_members (
    group_name TEXT NOT NULL,
    member     TEXT NOT NULL,
    seen_at    INTEGER NOT NULL,
    PRIMARY KEY (group_name, member)
) WITHOUT ROWID, STRICT;
CREATE INDEX group_members_member ON group_members (member);
-- The group that a message was sent to; NULL if it was sent to the recipient alone.
ALTER TABLE messages ADD COLUMN to_group TEXT;

-- Whom a person has paused: a name, which follows a rename. `until` NULL: until a person resumes it. A pause that is
-- over stays for an hour, because what its session sends is counted from there on.
CREATE TABLE pauses (
    name      TEXT PRIMARY KEY,
    paused_by TEXT NOT NULL,
    paused_at INTEGER NOT NULL,
    until     INTEGER
) STRICT;

-- A program of before would push to a paused session, and send for it: a brake that some ignore is none.
UPDATE bus SET oldest = 9;
