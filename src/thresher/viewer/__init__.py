"""The local web page on pools, selections and training runs: it shows, moves cuts, compares, and saves selections.

``subject`` opens what is shown, ``sets`` finds rows, ``cuts`` moves the last cut, ``answers``, ``maps``, ``words`` and
``runs`` compute what the page draws, ``security`` decides who may ask, ``server`` runs it. The page itself is built
from ``view/`` of the repository into ``static/``.
"""

from __future__ import annotations
