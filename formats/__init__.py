"""To other programs and back: a file for each format, and the models of transformers as peers."""
