"""What helps on data that training has not seen, and variations of a step that were tried for it."""
