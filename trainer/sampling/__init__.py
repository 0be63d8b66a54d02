"""Generating text from prompts that hold any media."""
