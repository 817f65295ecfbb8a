"""Studies: a script, expected numbers with their source, one protocol each."""
