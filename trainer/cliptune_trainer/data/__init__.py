"""From table files to batches: rows, split, augmentation, loader."""
