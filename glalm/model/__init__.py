"""The decoder: one skeleton, and a token mixer by name. Importing this package imports nothing."""
