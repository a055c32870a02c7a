"""Files, locks, errors, child processes, masking of secrets, content hashes."""
