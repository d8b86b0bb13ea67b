"""Entry of the zygote: ``python -I -S …/keeper/__main__.py --state-dir DIR --socket FD RESERVE``.

It is started by path, without ``site``: the only thing it can import besides the
standard library is what lies beside this package.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    from lessor_agent.keeper.zygote import main

    main(sys.argv[1:])
