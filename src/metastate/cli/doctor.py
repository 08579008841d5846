"""`metastate doctor`: is every backend right on this machine?"""

from __future__ import annotations

import argparse

from metastate.cli.progress import bar, print_json
from metastate.errors import ConfigError
from metastate.eval.doctor import devices_here, diagnose, doctor_table
from metastate.train.distributed import device_of


def run_doctor(args: argparse.Namespace) -> int:
    """Check and report; 1 where a backend that `auto` chooses is wrong."""
    devices = devices_here()
    if args.device:
        wanted = device_of(args.device)
        devices = [d for d in devices if d.type == wanted.type]
        if not devices:
            raise ConfigError(f"--device {args.device}: only cpu and cuda have backends to check")
        devices = devices if wanted.index is None else [wanted]
    with bar("doctor", "checks") as show:
        report = diagnose(devices, progress=show)
    if args.json:
        print_json(report)
    else:
        print(doctor_table(report))
    return 0 if report["ok"] else 1
