"""What models and runs are: summaries, quantization cards, plots, the page of a run, timing."""
