"""Split manifest to student weights and scores."""
