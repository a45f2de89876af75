"""Reading models and runs: summaries and pictures."""
