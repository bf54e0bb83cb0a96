"""Builders make corpora with real recognisers and noise models."""
