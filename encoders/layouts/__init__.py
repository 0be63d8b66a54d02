"""Layouts: how each model family writes media into its row; one file per family."""
