"""A seeded world in virtual time around the coordinator's core; see `world.world`."""
