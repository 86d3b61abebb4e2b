"""The page of a run: one HTML file that says how it goes."""
