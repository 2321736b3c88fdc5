"""From logits to text: the loop, the choice of a token, and ways to make both fast."""
