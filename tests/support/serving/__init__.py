"""What the tests of the service share beside the live servers: a champions folder to watch, a real browser."""
