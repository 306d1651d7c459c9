"""Adapters: one folder for each agent runtime, named in `agentbus.registry`, imported only when used."""
