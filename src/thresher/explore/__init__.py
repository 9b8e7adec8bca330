"""What a pool and a selection look like to people: names of clusters, what was lost, a map. Nothing is drawn here."""
