"""``python -m mmevm COMMAND …``: run the tools without a clone."""

import sys
from pathlib import Path

COMMANDS = {
    'train': 'train.py',
    'test': 'test.py',
    'infer': 'infer.py',
    'browse': 'browse_dataset.py',
    'plot': 'plot_training.py',
    'convert': 'convert_checkpoint.py',
    'export': 'export_onnx.py',
    'benchmark': 'benchmark_latency.py',
    'flops': 'get_flops.py',
    'coco-subset': 'coco_subset.py',
    'fetch-bccd': 'fetch_bccd.py',
}


def tools_dir() -> Path:
    """Return the folder of the tools: within the package from a wheel, beside it in a clone."""
    package = Path(__file__).parent
    installed = package / '.mim' / 'tools'
    return installed if installed.is_dir() else package.parent / 'tools'


def main() -> None:
    """Run the tool that the first argument names with the arguments that follow."""
    usage = (
        f'usage: python -m mmevm {{{",".join(COMMANDS)}}} …\n\npython -m mmevm COMMAND --help lists the arguments.\n'
    )
    arguments = sys.argv[1:]
    if arguments[:1] in (['-h'], ['--help']):
        sys.stdout.write(usage)
    elif not arguments or arguments[0] not in COMMANDS:
        problem = f'{arguments[0]!r} is not a command.' if arguments else 'no command was given.'
        sys.stderr.write(f'{usage}\npython -m mmevm: error: {problem}\n')
        sys.exit(2)
    else:
        command, *rest = arguments
        sys.argv = [f'python -m mmevm {command}', *rest]
        # Not runpy.run_path, which replaces sys.argv[0], so that usage messages would name the tool.
        path = tools_dir() / COMMANDS[command]
        exec(compile(path.read_bytes(), path, 'exec'), {'__name__': '__main__', '__file__': str(path)})


if __name__ == '__main__':
    main()
