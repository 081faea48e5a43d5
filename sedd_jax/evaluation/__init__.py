"""What a model is worth: perplexity of samples, MAUVE, reports and comparisons."""
