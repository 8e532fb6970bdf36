"""The two towers: built, loaded, saved, and wrapped as one model."""
