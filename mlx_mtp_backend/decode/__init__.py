"""Rounds: drafts, verification, sampling, and the depth that pays."""
