"""``python -m lessor_server``: the same as ``lessor server``."""

import sys

from lessor_server.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
