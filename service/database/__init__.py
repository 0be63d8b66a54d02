"""What the service remembers: tables, one writer that commits what waits together, migrations."""
