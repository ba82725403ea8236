"""``python -m feature_store`` is ``feature-store``."""

import sys

from feature_store.tools.cli import main

sys.exit(main())
