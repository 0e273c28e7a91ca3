"""Read checkpoints in Meta's layout: check them, load each rank's part, save packed weights."""
