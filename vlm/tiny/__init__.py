"""The miniature: rendered scenes, their texts, and base models small enough to live in the repository."""
