"""Selection methods and what they share: runs, recipes, scores, clusters."""
