-- Why a session receives the way it does, and what of its messages it has not read.
ALTER TABLE peers ADD COLUMN delivery_reason TEXT NOT NULL DEFAULT '';
CREATE INDEX messages_unread ON messages (delivered_to, id) WHERE delivered_at IS NOT NULL AND read_at IS NULL;
