"""Floor 3: one attention method per file; the file name is the registry key."""
