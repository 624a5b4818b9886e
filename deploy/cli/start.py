"""The name that `trimtab serve` had before."""

import sys

from deploy.cli.trimtab import old_way

if __name__ == "__main__":
    sys.exit(old_way("start", "serve"))
