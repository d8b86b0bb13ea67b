"""The command line: ``lessor``."""

import os

# gRPC takes this at its import, so it cannot wait for main. Without it, every
# connection that a restarting server closes is a line among the job's own output.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
