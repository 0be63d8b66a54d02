"""The sound-effect network of aiSFX: one feature for each two seconds; see README.md."""
