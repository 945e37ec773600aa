"""Training and measuring one candidate. Imports nothing of the search."""
