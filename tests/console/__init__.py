"""The console, by Textual's own driver of keys, on a real bus."""
