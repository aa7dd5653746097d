"""Training runs on images: sources, loop, checkpoints, figures, evaluation. Needs the extra `jlebm_fast[train]`."""
