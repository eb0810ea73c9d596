"""Membership, plan, tiles, sessions: everything that is decided once for all hands. Never imports torch."""
