"""``python -m lessor_agent``: the agent without the ``lessor`` command."""

import sys

from lessor_agent.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
