"""The MoE target: config, checkpoint to layers, forward, experts on disk, state."""
