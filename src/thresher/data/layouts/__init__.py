"""One file per reader of raw data; the folder is scanned, so there is no list to edit."""
