"""The DFlash draft: config, model, pairing, doctor."""
