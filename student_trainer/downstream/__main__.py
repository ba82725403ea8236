"""``python -m student_trainer.downstream detection|segmentation``: fine-tune an exported backbone."""

import sys

from feature_store.tools.command_line import import_commands

if __name__ == "__main__":
    sys.exit(import_commands("student_trainer.downstream.cli", "student_trainer.downstream", "student").main())
