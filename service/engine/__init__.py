"""The engine in a process of its own: what it does (`worker`), and who watches it (`host`)."""
