# SPDX-License-Identifier: BSD-3-Clause
"""``python -m pywino`` prints what ``pywino doctor`` prints; with arguments it is ``pywino``."""

import sys

if len(sys.argv) == 1:
    from pywino.cli.doctor import report

    print(report())
else:
    from pywino.cli import main

    main(prog_name="python -m pywino")
