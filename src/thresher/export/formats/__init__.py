"""Export formats, one per file; :mod:`thresher.export.registry` scans this folder."""
