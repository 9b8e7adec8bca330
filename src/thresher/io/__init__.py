"""Files: opening, names, formats. Headers first, damage named."""
