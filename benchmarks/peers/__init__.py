"""Programs of other loaders; see README.md."""
