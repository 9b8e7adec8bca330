"""Files: opening them, checking names in them, and the formats. Headers are read first; errors name the file."""
