"""Parts of towers: texts cut where nothing is read, contexts made longer, blocks with fewer passes."""
