"""The recipe: its schema, how it is loaded, and the rules that tie its fields together. No torch."""
