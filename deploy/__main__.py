"""`python -m deploy` is `trimtab`, where that is not on the PATH."""

import sys

from deploy.cli.trimtab import main

sys.exit(main())
