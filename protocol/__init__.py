"""What all processes share: ids, specs, messages, frames, errors, transport. Imports no torch and no other folder."""
