"""From data sets of any form to batches: rows, split, reading, augmentation, loader."""
