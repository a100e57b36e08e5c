"""The records of the methods that can be compared, by family."""
