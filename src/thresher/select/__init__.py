"""Methods, and what runs them: recipes, scores, clusters."""
