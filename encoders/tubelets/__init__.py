"""Cubes of a film's pixels, without a tower."""
