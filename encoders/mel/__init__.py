"""Sound without a tower: patches of log-mel frames; see README.md."""
