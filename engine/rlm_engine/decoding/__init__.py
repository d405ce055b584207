"""Depth controllers: which piece runs next, when a token halts, what is cached. No torch in here."""
