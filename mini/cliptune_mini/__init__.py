"""The weights of cliptune-mini, a small pretrained CLIP; cliptune finds and checks them by `SHA256SUMS`."""
