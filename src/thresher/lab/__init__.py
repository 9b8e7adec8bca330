"""The lab: plans of experiments that compare policies and selections, run with several seeds, with a table.

A plan (:mod:`thresher.lab.plan`) names corpora, rows of the table, seeds, a trainer and an evaluation. The runner makes
every corpus once, runs what is not there yet, each run in a process of its own, and writes ``results.json``,
``table.md`` and ``plot.png``.
"""
