"""Who may ask the service for what: tokens by role, and the origins of web pages."""
