"""Patches of a picture's pixels, without a tower."""
