"""Triggers: how a peer is woken. Each is one file here, is named in `agentbus.registry`, and is imported when used."""
