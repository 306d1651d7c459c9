"""Codex: its sessions share one app server, through whose control socket messages go in."""
