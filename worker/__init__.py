"""The daemon on each device: an asyncio control side and one compute thread that owns torch and the data sockets."""
