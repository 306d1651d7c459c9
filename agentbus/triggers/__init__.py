"""Triggers: how a peer is woken. One module each, named in `agentbus.registry`, imported only when used."""
