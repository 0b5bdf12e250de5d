"""The models that a server holds, and how they change."""
