"""The same clients, over HTTP."""
