"""Runs an image of buildah's as an orchestrator does, without a container engine.

``python container.py IMAGE [--volume HERE:THERE[:ro]] [--entrypoint PROGRAM] [--shm SIZE] -- ARGUMENT...``

The image's own entry point, command, variables, user and working directory; a read-only root, tmpfs on /tmp, a /dev/shm
of its own; the program is PID 1. The network is the host's. SIGTERM goes to the program, whose exit code is returned.
Needs root and the right to mount.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

CANNOT_MOUNT = 77


def buildah(*arguments: str) -> str:
    """Output of a command of buildah's."""
    return subprocess.run(["buildah", *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def make_mount_points(root: Path, volumes: list[str]) -> None:
    """Folders and files to mount on, as a container engine makes them."""
    for volume in volumes:
        here, there, *_ = volume.split(":")
        point = root / there.lstrip("/")
        if Path(here).is_dir():
            point.mkdir(parents=True, exist_ok=True)
        else:
            point.parent.mkdir(parents=True, exist_ok=True)
            point.touch()


def script(root: Path, config: dict[str, Any], options: argparse.Namespace) -> str:
    """Script of a shell in new namespaces: mounts, then the program."""
    user = config["User"] or "0:0"
    entrypoint = [options.entrypoint] if options.entrypoint else config["Entrypoint"]
    command = options.arguments or (config["Cmd"] if not options.entrypoint else [])
    program = ["env", "-i", "-C", config["WorkingDir"] or "/", *config["Env"], *entrypoint, *command]
    at = shlex.quote(str(root))
    lines = ["set -e", "mount --make-rprivate /", f"mount --bind {at} {at}"]
    for volume in options.volume:
        here, there, *mode = volume.split(":")
        lines.append(f"mount --bind {shlex.quote(here)} {at}{shlex.quote(there)}")
        if mode == ["ro"]:
            lines.append(f"mount -o remount,bind,ro {at}{shlex.quote(there)}")
    lines += [
        f"mount -o remount,bind,ro {at}",
        f"mount -t tmpfs -o mode=1777 tmpfs {at}/tmp",
        f"mount -t proc proc {at}/proc",
        f"mount --rbind /dev {at}/dev",
        f"mount -t tmpfs -o mode=1777,size={options.shm} tmpfs {at}/dev/shm",
        f"exec chroot --userspec={user} {at} {shlex.join(program)}",
    ]
    return "\n".join(lines)


def main() -> int:
    """Run the image; the program's exit code, or 77 where nothing can be mounted."""
    parser = argparse.ArgumentParser()
    parser.add_argument("image")
    parser.add_argument("--volume", action="append", default=[])
    parser.add_argument("--entrypoint")
    parser.add_argument("--shm", default="64m")
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options = parser.parse_args(sys.argv[1:at], argparse.Namespace(arguments=sys.argv[at + 1 :]))
    if subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "true"], check=False, stderr=subprocess.DEVNULL
    ).returncode:
        print("namespaces are not permitted here", file=sys.stderr)
        return CANNOT_MOUNT
    container = buildah("from", "--quiet", options.image)
    try:
        root = Path(buildah("mount", container))
        config = json.loads(buildah("inspect", container))["Docker"]["config"]
        make_mount_points(root, options.volume)
        command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script(root, config, options)]
        process = subprocess.Popen(command)

        def pass_on(number: int, _: object) -> None:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            for child in children:
                os.kill(int(child), number)

        signal.signal(signal.SIGTERM, pass_on)
        return process.wait()
    finally:
        subprocess.run(["buildah", "rm", container], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
