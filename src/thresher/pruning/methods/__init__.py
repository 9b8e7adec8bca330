"""The selection methods, one file each; the registry finds them."""
