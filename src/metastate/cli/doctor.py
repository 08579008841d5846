"""`metastate doctor`: is every backend right on this machine?"""

from __future__ import annotations

import argparse

import torch

from metastate.cli.progress import bar, print_json
from metastate.errors import ConfigError
from metastate.eval.doctor import devices_here, diagnose, doctor_table


def run_doctor(args: argparse.Namespace) -> int:
    """Check and report; 1 where a backend that `auto` chooses is wrong."""
    devices = devices_here()
    if args.device:
        try:
            wanted = torch.device(args.device)
        except RuntimeError as error:
            raise ConfigError(f"--device {args.device!r} is no device; there are: cpu, cuda") from (
                error
            )
        devices = [d for d in devices if d.type == wanted.type]
        if wanted.index is not None and wanted.index < torch.cuda.device_count():
            devices = [wanted]
        if not devices:
            raise ConfigError(f"--device {args.device}: this machine (or its torch) has none")
    with bar("doctor", "checks") as show:
        report = diagnose(devices, progress=show)
    if args.json:
        print_json(report)
    else:
        print(doctor_table(report))
    return 0 if report["ok"] else 1
