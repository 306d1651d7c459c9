"""What a bus is: names, mailboxes, messages, presence. Knows no trigger by name, no client, no terminal."""
