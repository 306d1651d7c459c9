-- The message that began the thread of a reply. NULL: this message began a thread itself, or it is a reply from before
-- this schema, or by a program of before: the thread of such a reply is found by the chain of the replies.
ALTER TABLE messages ADD COLUMN thread INTEGER;
CREATE INDEX messages_thread ON messages (thread, id) WHERE thread IS NOT NULL;
-- Until when the sender waits for an answer; NULL: it does not wait.
ALTER TABLE messages ADD COLUMN answer_by INTEGER;

-- The questions whose answers are waited for by a process that is not the peer of the asker's name: a command. The peer
-- of that name leaves them to it. `waiter` names the lock file that the process holds; empty: nothing can be locked.
CREATE TABLE asks (
    question INTEGER PRIMARY KEY REFERENCES messages (id) ON DELETE CASCADE,
    waiter   TEXT NOT NULL
) STRICT;

-- A program of schema 7 can go on: what it sends has no thread, and it does not ask.
UPDATE bus SET oldest = 7;
