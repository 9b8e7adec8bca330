"""Pure functions on arrays: no files, no engines, no state.

Shape letters: N rows, n rows of the current view, B rows of a block, K groups, D dimensions.
"""
