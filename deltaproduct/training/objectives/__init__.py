"""What models are trained for: tasks, and the next token of a corpus."""
