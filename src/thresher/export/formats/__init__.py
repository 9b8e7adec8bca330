"""Export formats, a file each; the folder is scanned, see :mod:`thresher.export.registry`."""
