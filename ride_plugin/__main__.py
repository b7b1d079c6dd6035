"""``python -m ride_plugin``: see docs/how-to/command-line.md."""

import sys

from ride_plugin._command_line import main

if __name__ == "__main__":
    sys.exit(main())
