"""Runs the command line, ``benchmarks.study.cli``, as the main module.

Spawned processes import the main module again unless it is called ``__main__``; importing it registers the teacher.
"""

import runpy

if __name__ == "__main__":
    runpy.run_module("benchmarks.study.cli", run_name="__main__", alter_sys=True)
