"""``python -m student_trainer`` is ``student-trainer``."""

import sys

from student_trainer.cli import main

sys.exit(main())
