"""What proves docs/reliability.md: longer than a test may take, each a command that writes a JSON."""
