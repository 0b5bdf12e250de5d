"""Requests and responses: routes, limits, negotiation and encodings."""
