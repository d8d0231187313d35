"""Faster forms of a whole model's towers: lean passes, compiled blocks. Exact, and undone where they fail."""
