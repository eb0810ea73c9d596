"""The arithmetic: tiles to blocks, decoder, KV cache, reduce, sampler, device profile. Opens no socket."""
