"""Plait over HTTP: Tinker's protocol, OpenAI's chat, one job log, and the engine in a process."""
