"""Other machines: the process that carries messages between this home and a NATS server. Nothing else needs it."""
