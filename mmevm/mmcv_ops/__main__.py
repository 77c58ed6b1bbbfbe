"""``python -m mmevm.mmcv_ops install``, ``uninstall`` or ``status``."""

import argparse
import sys

from .install import InstallError, install, status, uninstall

COMMANDS = {'install': install, 'uninstall': uninstall, 'status': status}


def main() -> None:
    """Run the command. Print its result to standard output and errors to standard error."""
    parser = argparse.ArgumentParser(
        prog='python -m mmevm.mmcv_ops',
        description='Use the fallback operators of mmevm in programs that import mmcv.ops before mmevm.',
    )
    parser.add_argument(
        'command',
        choices=COMMANDS,
        help='install writes mmcv/_ext.py, uninstall removes it, status prints which operators mmcv uses',
    )
    command = COMMANDS[parser.parse_args().command]
    try:
        sys.stdout.write(f'{command()}\n')
    except InstallError as error:
        sys.exit(str(error))


if __name__ == '__main__':
    main()
