"""``python -m mmevm.mmcv_ops install``, ``uninstall`` or ``status``."""

import argparse
import sys

from .stub import StubError, install, status, uninstall

COMMANDS = {'install': install, 'uninstall': uninstall, 'status': status}


def main() -> None:
    """Parse the command and do it; what was done goes to standard output, what hindered it to standard error."""
    parser = argparse.ArgumentParser(
        prog='python -m mmevm.mmcv_ops',
        description="Let programs that never import mmevm use its stand-in for mmcv's compiled operators.",
    )
    parser.add_argument(
        'command',
        choices=COMMANDS,
        help='install writes mmcv/_ext.py, uninstall removes it, status says what is in use',
    )
    command = COMMANDS[parser.parse_args().command]
    try:
        sys.stdout.write(f'{command()}\n')
    except StubError as error:
        sys.exit(str(error))


if __name__ == '__main__':
    main()
