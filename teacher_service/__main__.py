"""``python -m teacher_service``."""

import sys

from teacher_service.cli import main

sys.exit(main())
