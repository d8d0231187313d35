"""Generated: the public wire contract, `proto/cliptune/v1`."""
