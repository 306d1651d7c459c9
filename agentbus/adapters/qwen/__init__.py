"""Qwen Code: tools to send, and its documented session inbox to receive."""
